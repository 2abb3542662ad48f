"""The command `clex-train rope`: text, JSON, figure, comparison, and mistakes in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from clex_train.cli import rope
from clex_train.console import program
from tests.evaluation.evaluation_models import CONTEXT_LEN
from tests.evaluation.model_directories import save_clex_model
from tests.inspection.saved_configs import CONTEXT, HARSH, longrope, save_config, scaled

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs the program and returns exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rope", *arguments])
        code = program.run(rope.main, rope.usage)
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.fixture
def stretched(tmp_path: Path) -> Path:
    """A longrope with L as its original length: right in transformers, wrong in vLLM and llama.cpp."""
    parameters = longrope(CONTEXT, attention_factor=1.0)
    return save_config(tmp_path / "stretched", rope_parameters=parameters, max_position_embeddings=4 * CONTEXT)


def test_text_names_model_length_layers_and_traps(run, stretched: Path) -> None:
    code, out, _ = run(f"model={stretched}")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith(f"rope      {stretched}    clex-train ")
    assert (
        "  context     L = 256 (original_max_position_embeddings); read for 1,024 tokens (max_position_embeddings)"
        in out
    )
    assert "  layers      0-1: RoPE, full attention" in out
    assert sum(line.strip().startswith("! ") and "; remedy: " in line for line in lines) == 3
    row = next(line for line in lines if line.split()[:1] == ["0"]).split()
    # Pair 0: plain theta 1 over factor 26; 2 pi * 26 tokens; it turned many times within L.
    assert row == ["0", "0.03846", "163.4", "26", "6.268", "any"]


def test_json_has_every_pair_and_names_traps(run, stretched: Path) -> None:
    code, out, _ = run(f"model={stretched}", "json=true")
    found = json.loads(out)
    assert code == 0
    (shared,) = found["ropes"]
    assert shared["factor"] == pytest.approx(HARSH, rel=1e-6)
    assert [layer["rotates"] for layer in found["layers"]] == [True, True]
    names = {engine["engine"].split()[0]: [trap["name"] for trap in engine["traps"]] for engine in found["engines"]}
    assert names == {"transformers": [], "vLLM": ["magnitude"], "llama.cpp": ["scaling_dropped"], "SGLang": ["border"]}


def test_json_writes_null_for_a_pair_that_never_turns(run, tmp_path: Path) -> None:
    parameters = scaled("proportional", partial_rotary_factor=0.5)
    code, out, _ = run(f"model={save_config(tmp_path, rope_parameters=parameters)}", "json=true")
    (shared,) = json.loads(out)["ropes"]
    assert code == 0
    assert shared["wavelength"][4:] == [None] * 4
    assert shared["still_pairs"] == [4, 5, 6, 7]


def test_a_run_is_compared_with_plain_rope_and_drawn(run, tmp_path: Path) -> None:
    final, figure = tmp_path / "run" / "final", tmp_path / "figures" / "wavelengths.png"
    final.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    save_clex_model(final)
    code, out, _ = run(str(tmp_path / "run"), f"length={2 * CONTEXT_LEN}", f"other={final}", f"figure={figure}")
    assert code == 0
    assert f"t = 2 at {2 * CONTEXT_LEN} tokens, and config.json states t = 1" in out
    assert "CLEX theta" in out
    assert "loads plain RoPE, another model" in out
    assert "frequencies, magnitude, L, layers and lengths are the same" in out
    assert figure.read_bytes().startswith(PNG)
    assert [path.name for path in figure.parent.iterdir()] == [figure.name]


def test_all_pairs_are_shown_on_request(run, tmp_path: Path) -> None:
    folder = save_config(tmp_path, hidden_size=256, rope_parameters=scaled("default"))
    shown = [
        sum(
            line.split()[:1] != [] and line.split()[0].isdigit()
            for line in run(f"model={folder}", *extra)[1].splitlines()
        )
        for extra in ([], ["all_pairs=true"])
    ]
    assert shown == [12, 32]


def test_context_len_sets_l_where_an_export_does_not_state_it(run, tmp_path: Path) -> None:
    parameters = longrope(4 * CONTEXT, factor=1.0, attention_factor=1.0)
    folder = save_config(tmp_path, rope_parameters=parameters, max_position_embeddings=4 * CONTEXT)
    assert "L is not stated; context_len=N sets it" in run(f"model={folder}")[1]
    assert "L = 256 (context_len)" in run(f"model={folder}", "context_len=256")[1]
    (folder / "clex_export.json").write_text(json.dumps({"context_len": 128}))
    assert "L = 128 (clex_export.json)" in run(f"model={folder}")[1]


REMOTE: dict[str, Any] = {
    "model_type": "of_its_own",
    "auto_map": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
}


@pytest.mark.parametrize(
    ("facts", "arguments", "words"),
    [
        (None, [], "model=DIR: no readable config.json"),
        ({"model_type": "of_no_program"}, [], "model=DIR: no readable config.json"),
        (REMOTE, [], "trust_remote_code=false: DIR has code of its own (configuration_own.py)"),
        ({"model_type": "gpt2", "hidden_size": 64, "n_head": 4}, [], "no rotary position embedding"),
        ({"rope_parameters": scaled("linear", factor="four")}, [], "factor='four'"),
        ({"rope_parameters": scaled("of_no_program")}, [], "rope_type='of_no_program'"),
        ({"num_attention_heads": 0}, [], "model=DIR: no readable config.json"),
        ({}, ["length=1"], "length=1: a number of tokens from 2"),
        ({}, ["length=many"], "length"),
        ({}, ["run=DIR"], "name either model=DIR or run=FOLDER"),
        ({}, ["other=DIR/missing"], "other=DIR/missing: no such directory"),
        ({}, ["figure=DIR/a.svg"], "name a file that ends in .png"),
        ({}, ["figure=DIR/config.json/a.png"], "figure=DIR/config.json/a.png"),
        ({}, ["lenght=3"], "length"),
    ],
)
def test_mistakes_are_one_line(
    run, tmp_path: Path, facts: dict[str, Any] | None, arguments: list[str], words: str
) -> None:
    if facts is not None:
        save_config(tmp_path, **facts)
    code, out, err = run(f"model={tmp_path}", *(each.replace("DIR", str(tmp_path)) for each in arguments))
    assert (code, out) == (program.USER_ERROR, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert words.replace("DIR", str(tmp_path), 1) in line or words in line
    assert "Traceback" not in err


def test_a_length_beyond_the_table_is_refused(run, tmp_path: Path) -> None:
    save_clex_model(tmp_path)
    code, _, err = run(f"model={tmp_path}", f"length={4 * CONTEXT_LEN + 1}")
    assert code == program.USER_ERROR
    assert f"length={4 * CONTEXT_LEN + 1}: the CLEX table ends at t_max * L = {4 * CONTEXT_LEN:,} tokens" in err


def test_help_lists_every_key(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {key} (" in out for key in ("model", "length", "other", "figure", "json", "all_pairs"))
