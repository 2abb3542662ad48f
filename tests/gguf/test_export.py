"""The export program with format=gguf: what it writes beside the file, and refusals in one line."""

import json
from pathlib import Path

import pytest

from clex_train.cli import export
from clex_train.config.scaling import LogScale
from clex_train.console import program
from clex_train.gguf import files
from tests.export.harsh_models import save_harsh
from tests.gguf import gguf_models
from tests.gguf.gguf_models import CONTEXT, T


@pytest.fixture(scope="module")
def final(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a Llama with a field and log-scaling."""
    return gguf_models.save_clex(tmp_path_factory.mktemp("model") / "final", log_scale=LogScale.eval)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["export", "format=gguf", *arguments])
    return program.run(export.main, export.usage)


def test_the_file_has_its_record_and_card_beside_it(final, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "new" / "my_model"
    assert call(monkeypatch, f"model={final}", "t=4", "weight_type=bf16", f"output={output}") == 0
    assert f"written to {output / 'model.gguf'}: t = 4, up to 256 tokens" in capsys.readouterr().out
    reader = files.read(output / "model.gguf")
    assert files.contents(reader, "general.name") == "my_model"
    assert files.contents(reader, "llama.context_length") == T * CONTEXT
    assert {each.tensor_type.name for each in reader.tensors if each.name.endswith("attn_q.weight")} == {"BF16"}
    record = json.loads((output / "clex_export.json").read_text())
    expected = {"t": T, "context_len": CONTEXT, "served_len": 256, "digest": "harsh", "log_scale": "eval"}
    assert record.items() >= {**expected, "base_gguf": None}.items()
    assert record["scale"] == pytest.approx(8 / 6)
    assert "Exported by clex-train. llama.cpp runs it" in (output / "README.md").read_text()
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "clex_export.json", "model.gguf"]


def test_factors_are_added_to_a_quantised_file(final, tmp_path, monkeypatch) -> None:
    base, output = gguf_models.quantised(tmp_path / "q8.gguf", final), tmp_path / "out"
    assert call(monkeypatch, f"model={final}", "length=256", f"base_gguf={base}", f"output={output}") == 0
    reader = files.read(output / "model.gguf")
    assert {each.tensor_type.name for each in reader.tensors if each.name.endswith("attn_q.weight")} == {"Q8_0"}
    # The weights stay, so cos and sin have the constant.
    assert files.contents(reader, "llama.rope.scaling.attn_factor") == pytest.approx((8 / 6) ** 0.5)
    assert json.loads((output / "clex_export.json").read_text())["base_gguf"] == str(base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t=5"], "t=5: from 1 to t_max=4"),
        (["t=4", "weights=copy"], "weights=copy: this format writes the weights anew"),
        (["t=4", "format=huggingface", "weight_type=f16"], "weight_type=f16: only format=gguf"),
        (["t=4", "format=vllm", "base_gguf=a.gguf"], "base_gguf=a.gguf: only format=gguf"),
        (
            ["t=4", "base_gguf={final}/config.json", "weight_type=f16"],
            "weight_type=f16: tensors of base_gguf are copied",
        ),
        (["t=4", "base_gguf=no.gguf"], "base_gguf=no.gguf: no such file"),
        (["t=4", "base_gguf={factors}"], "has RoPE factors already"),
        (["t=4", "base_gguf={final}/config.json"], "not a GGUF file"),
        (["t=4", "base_gguf={untrained}"], "is not model.layers.0.input_layernorm.weight of"),
        (["t=4", "base_gguf={other}"], "block_count is 3, and the model's is 2: it is another model"),
        (["t=4", "model={qwen3}"], "format=gguf: llama.cpp"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line_and_leaves_nothing(
    arguments: list[str], message: str, final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    places = {
        "final": final,
        "factors": tmp_path / "has.gguf",
        "qwen3": tmp_path / "qwen3",
        "other": tmp_path / "b.gguf",
    }
    places["untrained"] = tmp_path / "u.gguf"
    if any("{untrained}" in each for each in arguments):
        gguf_models.quantised(places["untrained"], gguf_models.save(tmp_path / "before", seed=1))
    if any("{other}" in each for each in arguments):
        gguf_models.quantised(places["other"], gguf_models.save(tmp_path / "deeper", num_hidden_layers=3))
    if any("{factors}" in each for each in arguments):
        gguf_models.write_gguf(places["factors"], final, gguf_models.factors(16), CONTEXT)
    if any("{qwen3}" in each for each in arguments):
        save_harsh(places["qwen3"], "qwen3")
    arguments = [f"model={final}", f"output={tmp_path / 'new' / 'out'}", *(each.format(**places) for each in arguments)]
    assert call(monkeypatch, *arguments) == program.USER_ERROR
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_refused_before_anything_is_written(final, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    assert call(monkeypatch, f"model={final}", "t=4", f"output={tmp_path / 'new' / 'out'}") == program.USER_ERROR
    assert "make room or name another place" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
