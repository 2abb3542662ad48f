"""The evaluate program with weights sharded over two ranks, against one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clex_train.cli import evaluate as program
from clex_train.console import program as console
from tests.evaluation.model_directories import save_clex_model, save_model, save_store, save_tokenizer
from tests.evaluation.sharded_loading import ARGUMENTS, arguments
from tests.helpers import environments
from tests.helpers.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def launch(*command: str) -> None:
    environment = environments.launch_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(file: Path) -> dict[str, float]:
    return json.loads(file.read_text())["metrics"]


def in_one_process(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> dict[str, float]:
    """Run the same evaluation without sharding and move its file away."""
    output = Path(next(word for word in words if word.startswith("output=")).removeprefix("output="))
    alone = output.with_name("alone.json")
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, f"output={alone}"])
    assert console.run(program.main, program.usage) == 0
    return metrics(alone)


def test_the_documented_command_gives_the_numbers_of_one_process(tmp_path, monkeypatch) -> None:
    save_clex_model(tmp_path / "clex" / "model")
    save_store(tmp_path / "store")
    words = arguments(tmp_path, "clex")
    deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
    launch(*deepspeed, "--master_port", free_port(), "--module", "clex_train.cli.evaluate", *words, "sharded=true")
    found = metrics(tmp_path / "clex" / "result.json")
    assert found == pytest.approx(in_one_process(monkeypatch, words), rel=1e-5)
    assert len(found) == 12
    assert json.loads((tmp_path / "clex" / "result.json").read_text())["environment"]["world_size"] == 2


@pytest.mark.slow
def test_directories_of_every_layout_are_sharded_while_loading(tmp_path, monkeypatch, goldens) -> None:
    save_store(tmp_path / "store")
    save_model(tmp_path / "stock" / "model")
    save_clex_model(tmp_path / "clex_offloaded" / "model")
    official = tmp_path / "official" / "model"
    official.mkdir(parents=True)
    shutil.copyfile(goldens / "clex_llama.config.json", official / "config.json")
    shutil.copyfile(goldens / "clex_llama.weights.safetensors", official / "model.safetensors")
    save_tokenizer(official, 97)
    names = ["stock", "clex_offloaded", "official"]
    script = Path(__file__).with_name("sharded_loading.py")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    launch(sys.executable, *torchrun, str(script), str(tmp_path), *names)
    for name in names:
        shares = [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in range(2)]
        assert shares == pytest.approx([0.5, 0.5], abs=0.02)
        alone = in_one_process(monkeypatch, arguments(tmp_path, name))
        assert metrics(tmp_path / name / "result.json") == pytest.approx(alone, rel=1e-5)
        assert len(alone) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["offload_parameters=true"], "offload_parameters=True: only sharded weights can be kept on the host"),
        (["attention=flash_attention_2"], "attention=flash_attention_2: flash-attn is not installed"),
        (["attention=flash"], "attention: should be one of auto, sdpa"),
        (["sharded=true", "protocols=[streaming]", "methods=[none]"], "sharded=True: streaming is read with whole"),
    ],
)
def test_contradictory_keys_are_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    save_model(tmp_path / "model")
    save_store(tmp_path / "store")
    words = [f"model={tmp_path / 'model'}", f"data={tmp_path / 'store'}", *ARGUMENTS, *arguments]
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    capsys.readouterr()
    assert console.run(program.main, program.usage) == console.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
