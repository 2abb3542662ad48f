"""The mean of a run's last checkpoints: equal to a float64 mean by hand, loadable, evaluable, and whole or absent."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from clex_train.api import load_for_evaluation
from clex_train.checkpoint import weights
from clex_train.cli import average as program
from clex_train.cli import evaluate
from clex_train.config.model import ModelConfig
from clex_train.console import program as console
from clex_train.export import average, final
from clex_train.models import directory
from clex_train.utils.errors import ConfigError

STEPS = [1, 2, 3]
CLEX = ("scaling=clex", "scaling.lr_scale=1.0", "scaling.t_max=4", "optim.weight_decay=0.1")
SHORT = ("evaluation=never", "optim.batch_rows=2", "optim.steps=3", "checkpoint.every=1", "checkpoint.keep_last=8")
RUNS = {
    "plain": ("engine.zero_stage=0", "engine.precision=fp32"),
    "zero0": ("engine.zero_stage=0", "engine.precision=bf16", *CLEX),
    "static": ("engine.zero_stage=0", "scaling=static", "scaling.factor=4", "optim.weight_decay=0.1"),
    "zero2": ("engine.zero_stage=2", "engine.precision=bf16", *CLEX),
}


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function that trains one of `RUNS` for three steps with a checkpoint after each, once."""
    folder = tmp_path_factory.mktemp("averaged")

    def run(name: str) -> Path:
        if not (folder / name).exists():
            train.run(tiny_run(folder / name, *SHORT, *RUNS[name]))
        return folder / name

    return run


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str, main: Any = program) -> int:
    monkeypatch.setattr(sys, "argv", [main.__name__, *arguments])
    return console.run(main.main, main.usage)


def by_hand(tensors: list[Tensor]) -> Tensor:
    return sum((tensor.double() for tensor in tensors), torch.tensor(0.0).double()) / len(tensors)


def masters(run: Path, step: int) -> dict[str, Tensor]:
    """Return the float32 weights of a checkpoint, by DeepSpeed's own script where it supports the stage."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = run / "checkpoints" / f"step_{step}"
    if not (folder / "mp_rank_00_model_states.pt").exists() or any(folder.glob("*optim_states.pt")):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    if "fp32_groups" not in state["optimizer"]:
        return state["module"]
    names = [name for name in state["module"] if name != "lm_head.weight"]
    grouped = [name for name in names if "norm" not in name] + [name for name in names if "norm" in name]
    return dict(zip(grouped, [copy for group in state["optimizer"]["fp32_groups"] for copy in group], strict=True))


def assert_is_mean(output: Path, run: Path, steps: list[int]) -> None:
    """Compare every weight, the field and the table of a directory with means by hand."""
    saved, found = load_file(output / "model.safetensors"), [masters(run, step) for step in steps]
    assert saved.keys() == load_file(run / "final" / "model.safetensors").keys()
    for name, weight in saved.items():
        assert torch.equal(weight, by_hand([state[name] for state in found]).to(weight.dtype)), name
    fields = [torch.load(run / "checkpoints" / f"step_{n}" / "ode.pt", weights_only=True)["clex"] for n in steps]
    field, table, record = directory.read_clex(output)
    for name in ("up", "down"):
        assert torch.equal(field.state_dict()[name], by_hand([state[name] for state in fields]).float()), name
        assert not torch.equal(fields[0][name], fields[-1][name]), name
    assert record.averaged == steps
    assert table.digest == field.digest()
    assert torch.equal(table.inv_freq, field.table(table.t).inv_freq)


@pytest.mark.parametrize("name", ["zero0", "zero2"])
def test_weights_and_field_are_a_float64_mean_rounded_once(finished, name, tmp_path, monkeypatch, capsys) -> None:
    run, output = finished(name), tmp_path / "mean"
    assert call(monkeypatch, f"run={run}", "last=3", f"output={output}") == 0
    assert f"written to {output}: the mean of steps 1, 2, 3" in capsys.readouterr().out
    assert_is_mean(output, run, STEPS)
    facts = [json.loads((folder / "config.json").read_text()) for folder in (output, run / "final")]
    stated = [each.pop("rope_parameters") for each in facts]
    assert stated[0]["long_factor"] != stated[1]["long_factor"]
    assert facts[0] == facts[1]
    assert facts[0]["dtype"] == "bfloat16"
    assert "mean of the run's checkpoints at steps 1, 2, 3" in (output / "README.md").read_text()
    assert final.is_finished(output)
    assert directory.read_record(run / "final").averaged is None


def test_the_mean_of_one_checkpoint_is_the_final_model(finished) -> None:
    for name in RUNS:
        (found,) = weights.newest(finished(name) / "checkpoints", 1)
        stored, saved = weights.open_weights(found), load_file(finished(name) / "final" / "model.safetensors")
        averaged = dict(weights.mean([stored, stored], stored.dtype))
        assert averaged.keys() == saved.keys()
        assert all(torch.equal(averaged[key], weight) for key, weight in saved.items()), name


def test_the_mean_loads_and_evaluates(finished, tiny_store, tmp_path, monkeypatch, capsys) -> None:
    output = tmp_path / "mean"
    assert call(monkeypatch, f"run={finished('zero2')}", "last=2", f"output={output}") == 0
    loaded = load_for_evaluation(ModelConfig(path=str(output)))
    assert (loaded.context_len, loaded.table.t.tolist()) == (32, [1.0, 2.0, 3.0, 4.0])
    given = (f"model={output}", f"data={tiny_store}", "lengths=[32,64]", "num_windows=1", "methods=[trained]")
    assert call(monkeypatch, *given, f"output={tmp_path / 'r.json'}", main=evaluate) == 0
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert [score["length"] for score in scores] == [32, 64]
    assert all(1 < score["perplexity"] < 1e4 for score in scores)


def test_learned_static_factors_are_averaged_and_stated(finished, tmp_path, monkeypatch) -> None:
    run, output = finished("static"), tmp_path / "mean"
    assert call(monkeypatch, f"run={run}", "last=3", f"output={output}") == 0
    states = [torch.load(run / "checkpoints" / f"step_{n}" / "ode.pt", weights_only=True)["clex"] for n in STEPS]
    alpha, start = by_hand([state["alpha"] for state in states]), states[0]["start"]
    assert not torch.equal(states[0]["alpha"], states[-1]["alpha"])
    loaded = load_for_evaluation(ModelConfig(path=str(output)))
    torch.testing.assert_close(loaded.handle.own.at(4.0).inv_freq, start * alpha.exp(), rtol=1e-6, atol=0)


def test_a_run_without_a_field_is_averaged_from_its_whole_weights(finished, tmp_path, monkeypatch) -> None:
    run, output = finished("plain"), tmp_path / "mean"
    assert call(monkeypatch, f"run={run}", "last=2", f"output={output}") == 0
    saved = load_file(output / "model.safetensors")
    for name, weight in saved.items():
        assert torch.equal(weight, by_hand([masters(run, step)[name] for step in (2, 3)]).float()), name
    assert not directory.has_clex(output)
    assert "checkpoints at steps 2, 3" in (output / "README.md").read_text()


def test_an_unfinished_run_is_averaged(finished, tmp_path, monkeypatch) -> None:
    run, output = tmp_path / "run", tmp_path / "mean"
    shutil.copytree(finished("zero2"), run, ignore=shutil.ignore_patterns("final", "step_3", "latest"))
    assert call(monkeypatch, f"run={run}", "last=2", f"output={output}") == 0
    assert directory.read_record(output).averaged == [1, 2]


def test_an_interrupted_average_leaves_nothing_behind(finished, tmp_path, monkeypatch, capsys) -> None:
    output, killed = tmp_path / "mean", tmp_path / "saving_mean"

    def interrupted(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("clex_train.export.final.checksums.write", interrupted)
        assert call(patched, f"run={finished('zero2')}", f"output={output}") == 130
    assert [*tmp_path.iterdir()] == []
    # After SIGKILL the partial folder stays, under a name that no program reads, until the next attempt.
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    assert call(monkeypatch, f"run={finished('zero2')}", f"output={output}") == 0
    assert [*tmp_path.iterdir()] == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("last=1",), "last=1: at least 2 checkpoints; the weights of the last step are in final/"),
        (("last=4",), "last=4: {run}/checkpoints has 3 checkpoints; a run keeps more with checkpoint.every"),
        (("output={run}",), "output={run}: exists already; name another directory"),
        (("output=",), "name the directory to write, output=DIR"),
        (("run={run}/final",), "not a run folder (no config.yaml)"),
        (("run={run}/nowhere",), "no such folder; give the output_dir of a training run"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line(
    finished, arguments, message, tmp_path, monkeypatch, capsys
) -> None:
    run = finished("zero2")
    given = (f"run={run}", f"output={tmp_path / 'mean'}", *(each.format(run=run) for each in arguments))
    capsys.readouterr()
    assert call(monkeypatch, *given) == console.USER_ERROR
    error = capsys.readouterr().err
    assert message.format(run=run) in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_a_damaged_checkpoint_is_refused_and_no_older_one_takes_its_place(finished, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("zero2"), run)
    (path,) = (run / "checkpoints" / "step_2").glob("*optim_states.pt")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"step_2: damaged \(.*SHA-256"):
        weights.newest(run / "checkpoints", 2)
    (run / "checkpoints" / "step_2" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"step_2: damaged \(manifest.json is missing"):
        weights.newest(run / "checkpoints", 2)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        # The averaged field is checked like that of a checkpoint.
        ("  max_residual: .*", "  max_residual: 1.0e-12", r"last=3: the CLEX field moved .* in the mean of"),
        ("  param_factor: 1.0", "  param_factor: 2.0", r"4 parameters differ .* from the field of config.yaml"),
        ("  config: .*", "  config: {other}", r"step_3: was trained on another architecture than that of {other}"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(finished, before, after, message, tiny_architecture, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished("zero2"), run)
    shutil.copytree(tiny_architecture, other)
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**facts, "intermediate_size": 48}))
    text = (run / "config.yaml").read_text()
    changed = re.sub(f"^{before}$", after.format(other=other), text, flags=re.MULTILINE)
    assert changed != text
    (run / "config.yaml").write_text(changed)
    with pytest.raises(ConfigError, match=message.format(other=other)):
        average.plan(run, 3)


def test_parameters_of_other_shapes_are_refused_by_name() -> None:
    one, two = ({"a": torch.Size([2]), "b": torch.Size([n])} for n in (3, 4))
    weights.require_alike("checkpoint", [one, dict(one)], ["step_1", "step_2"])
    for other in (two, {"a": torch.Size([2])}):
        with pytest.raises(ConfigError, match=r"checkpoint=step_2: 1 parameters differ .* from step_1, such as b;"):
            weights.require_alike("checkpoint", [one, other], ["step_1", "step_2"])
