"""Faults in the training loop: non-finite steps, spikes, roll-backs and out of memory, on one process."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from clex_train.checkpoint.store import Checkpoints
from clex_train.console import program
from clex_train.training import loop, recovery, state
from clex_train.training.step import ForwardPass
from clex_train.utils.errors import RunStopped
from tests.helpers.same_models import assert_same_model


@pytest.fixture(params=[1, 2, 3])
def stage(request) -> int:
    """Return the stage of ZeRO."""
    return request.param


@pytest.fixture
def run(tmp_path, tiny_run):
    """Return a function that runs train.run on a tiny model, by default without evaluation."""

    def start(*overrides: str) -> int:
        length = ("optim.batch_rows=2", "optim.steps=8", "checkpoint.every=2")
        return train.run(tiny_run(tmp_path / "run", "evaluation=never", "scaling=clex", *length, *overrides))

    start.folder = tmp_path / "run"
    return start


def metrics(run) -> list[dict]:
    """Return the lines of steps and evaluations."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "save_seconds" not in line]


def corrupt_output(monkeypatch, rows: set[int], module: str = "model.layers.1.mlp", value: float = math.nan) -> None:
    """Multiply the output of `module` for these rows by `value`, as a bad batch or a broken kernel would."""
    loss = ForwardPass.loss

    def corrupted(self, model, batch, weight):
        if not rows.intersection(batch.row_indices.tolist()):
            return loss(self, model, batch, weight)
        broken = getattr(model, "module", model).get_submodule(module)
        hook = broken.register_forward_hook(lambda module, inputs, out: out * value, prepend=True)
        try:
            return loss(self, model, batch, weight)
        finally:
            hook.remove()

    monkeypatch.setattr(ForwardPass, "loss", corrupted)


class NonFiniteGradient(torch.autograd.Function):
    """Pass its input on, with a non-finite gradient."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


def test_a_non_finite_step_is_skipped_by_model_and_ode(run, monkeypatch):
    corrupt_output(monkeypatch, {4})
    assert run() == 8
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[2]["loss"] is None
    assert rows[2]["fault"] == "rank 0, rows [[4, 5]]: first in the output of model.layers.1.mlp"
    assert all(math.isfinite(row["loss"]) for row in rows[3:]), "the weights stayed whole"


def test_a_non_finite_gradient_is_traced_to_its_module(run, monkeypatch, stage):
    loss = ForwardPass.loss

    def corrupted(self, model, batch, weight):
        layer = getattr(model, "module", model).get_submodule("model.layers.0.self_attn.o_proj")
        bursts = 4 in batch.row_indices.tolist()
        hook = layer.register_forward_hook(lambda module, inputs, out: NonFiniteGradient.apply(out) if bursts else out)
        try:
            return loss(self, model, batch, weight)
        finally:
            hook.remove()

    monkeypatch.setattr(ForwardPass, "loss", corrupted)
    assert run(f"engine.zero_stage={stage}") == 8
    (fault,) = [row["fault"] for row in metrics(run) if "fault" in row]
    assert fault.startswith("rank 0, rows [[4, 5]]: first in the gradient of the output of model.layers.0.self_attn.")
    assert metrics(run)[2]["loss"] is not None


TILES = ("engine.tiled_loss=5", "engine.tiled_mlp=7")


@pytest.mark.parametrize("options", [(), TILES], ids=["whole", "in_tiles"])
def test_searching_for_the_fault_changes_nothing(run, monkeypatch, stage, options):
    corrupt_output(monkeypatch, {4})
    folders = [run.folder.with_name(name) for name in ("looked", "not_looked")]
    run(f"output_dir={folders[0]}", f"engine.zero_stage={stage}", *options)
    (line,) = (line for line in (folders[0] / "metrics.jsonl").read_text().splitlines() if '"fault"' in line)
    assert json.loads(line)["fault"] == "rank 0, rows [[4, 5]]: first in the output of model.layers.1.mlp"
    monkeypatch.setattr(recovery, "find_fault", lambda *_: "")
    run(f"output_dir={folders[1]}", f"engine.zero_stage={stage}", *options)
    assert_same_model(*(folder / "final" for folder in folders))


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(run, monkeypatch):
    corrupt_output(monkeypatch, {8, 11})
    with pytest.raises(RunStopped, match=r"step 6: loss nan.*rows \[\[10, 11\]\].*the last checkpoint is .*step_4"):
        run("optim.max_bad_steps=2")
    assert not (run.folder / "checkpoints" / "step_6").exists()


def test_a_run_without_a_successful_step_stops_and_writes_no_model(run, monkeypatch):
    corrupt_output(monkeypatch, set(range(16)))
    finished, finish = [], Checkpoints.finish
    monkeypatch.setattr(Checkpoints, "finish", lambda self: (finished.append(True), finish(self)))
    with pytest.raises(
        RunStopped, match=r"step 2: loss nan.*first in the output of model\.layers\.1\.mlp.*"
    ) as stopped:
        run("optim.steps=2")
    assert "none of the run's 2 steps was taken, so nothing was learned" in str(stopped.value)
    assert finished, "a checkpoint that is being written is left whole"
    assert program.report(stopped.value) == program.STOPPED
    assert not (run.folder / "final").exists()
    assert not list((run.folder / "checkpoints").glob("step_*"))


def test_a_run_with_only_its_last_step_skipped_finishes(run, monkeypatch):
    corrupt_output(monkeypatch, {2, 3})
    assert run("optim.steps=2") == 2
    assert (run.folder / "final").is_dir()


def test_initial_weights_with_a_nan_are_named(run, tmp_path, tiny_store):
    run("optim.steps=1", "scaling=none")
    base = run.folder.rename(tmp_path / "base") / "final"
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunStopped, match=r"the weights of model\.layers\.1\.mlp\.up_proj\.weight are not finite"):
        run("optim.steps=2", f"model.path={base}")


def test_a_model_broken_by_its_learning_rate_is_not_blamed_on_that_of_the_field(run):
    with pytest.raises(RunStopped) as stopped:
        run("optim.lr=10", "optim.warmup=0")
    line = str(stopped.value)
    assert "optim.lr" in line
    assert "lower scaling.lr_scale" not in line


def test_more_steps_of_a_finished_run_are_refused_with_advice_to_train_its_model_further(run):
    run("optim.steps=2")
    with pytest.raises(ValueError, match=r"^optim\.steps=4: .* is finished after 2 steps, .*model\.path=.*run/final"):
        run("optim.steps=4")


def test_a_run_resumes_after_its_base_has_moved(run, tmp_path, caplog):
    caplog.set_level("INFO", logger="clex_train")
    run("optim.steps=1", "scaling=none")
    base = run.folder.rename(tmp_path / "base") / "final"
    run(f"model.path={base}", "optim.steps=4")
    whole = shutil.copytree(run.folder, tmp_path / "whole")
    for part in ("final", "checkpoints/step_4"):
        shutil.rmtree(run.folder / part)
    moved = base.rename(tmp_path / "elsewhere")
    assert run(f"model.path={moved}", "optim.steps=4") == 4
    assert f"model.path changed from {base} to {moved}; the run resumes from its own checkpoint" in caplog.text
    assert_same_model(whole / "final", run.folder / "final")


def test_the_state_before_bad_steps_is_saved_and_resumes_bitwise(run, monkeypatch):
    whole = run.folder.with_name("whole")
    run("checkpoint.every=0", f"output_dir={whole}")
    with monkeypatch.context() as broken:
        corrupt_output(broken, {6, 8})
        with pytest.raises(RunStopped, match=r"step 5: .*2 such steps in a row.*the last checkpoint is .*step_3;"):
            run("checkpoint.every=0", "optim.max_bad_steps=2")
    assert run("checkpoint.every=0", "optim.max_bad_steps=2") == 8
    assert_same_model(whole / "final", run.folder / "final")


def test_a_field_beyond_its_bound_stops_the_run_before_saving(run, capsys):
    with pytest.raises(RunStopped, match=r"step \d: .*scaling\.max_residual.*another output_dir") as stopped:
        run("scaling.lr_scale=1", "optim.lr=0.05", "scaling.max_residual=1e-3")
    assert program.report(stopped.value) == program.STOPPED
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: step ")
    for saved in (run.folder / "checkpoints").glob("step_*/ode.pt"):
        assert torch.load(saved, weights_only=True)["clex"]["down"].isfinite().all()


def test_a_run_killed_between_saving_and_evaluating_evaluates_on_resume(run, monkeypatch):
    evaluated = []
    from clex_train.measures.during_training import TrainingEvaluation

    def fails_at_4(self, loaded, step):
        evaluated.append(step)
        if step == 4 and evaluated.count(4) == 1:
            raise KeyboardInterrupt
        return {"perplexity/trained/one_shot/32": 1.0}

    monkeypatch.setattr(TrainingEvaluation, "__call__", fails_at_4)
    with pytest.raises(KeyboardInterrupt):
        run("evaluation.every=4")
    assert run("evaluation.every=4") == 8
    assert evaluated == [4, 4, 8]
    rows = metrics(run)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "perplexity/trained/one_shot/32" in row] == [4, 8]


def test_a_finished_run_returns_at_once(run, monkeypatch):
    assert run() == 8
    before = (run.folder / "final" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(loop, "train", None)
    assert run() == 8
    assert (run.folder / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_weights_with_a_field_are_not_trained_further_without_it(run):
    run()
    with pytest.raises(ValueError, match=r"scaling\.name=none: .* has a CLEX field"):
        run(
            "scaling=none",
            "model.init=pretrained",
            f"model.path={run.folder / 'final'}",
            f"output_dir={run.folder}_unused",
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory: 8 TB"),
    ],
)
def test_out_of_memory_in_a_step_prints_the_estimate_and_what_to_reduce(run, monkeypatch, capsys, error):
    def full(parts, batch, spectrum, weight=1.0):
        raise error

    monkeypatch.setattr(loop, "forward_backward", full)
    with pytest.raises(RunStopped) as stopped:
        run()
    assert program.report(stopped.value) == program.STOPPED
    said = capsys.readouterr().err
    assert "error: out of memory on rank 0: " in said
    for part in ("parameters", "gradients", "optimizer", "activations", "logits", "ODE", "total"):
        assert f"\n  {part} " in said, part
    remedies = ("micro_batch=1", "tiled_loss=1024", "activation_checkpointing=true", "tiled_mlp", "offload=optimizer")
    for remedy in remedies:
        assert f"engine.{remedy}" in said, remedy
    # The option that frees most comes first: logits of 512 tokens are smaller than the activations of layers.
    assert said.index("engine.activation_checkpointing") < said.index("engine.tiled_loss")
    assert "Traceback" not in said


def add_spike(monkeypatch, rows: set[int]) -> None:
    """Multiply the loss, and so its gradient, by a thousand for these rows."""
    loss = ForwardPass.loss

    def corrupted(self, model, batch, weight):
        found = loss(self, model, batch, weight)
        return found * 1000 if rows.intersection(batch.row_indices.tolist()) else found

    monkeypatch.setattr(ForwardPass, "loss", corrupted)


SPIKES = ("optim.spike_factor=20", "optim.spike_window=4")


def test_rolling_back_a_spike_gives_a_run_without_its_rows(run, monkeypatch):
    without = run.folder.with_name("without")
    run(*SPIKES, "data.skip_rows=[12-13]", f"output_dir={without}")
    add_spike(monkeypatch, {12})
    assert run(*SPIKES) == 8
    assert_same_model(without / "final", run.folder / "final")
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    assert [row["rows"] for row in metrics(run)][5:] == [[[10, 11]], [[14, 15]], [[16, 17]]]


def test_a_run_killed_after_a_roll_back_skips_the_same_rows_again(run, monkeypatch):
    add_spike(monkeypatch, {10, 14})
    whole = run.folder.with_name("whole")
    run(*SPIKES, "optim.steps=10", f"output_dir={whole}")
    save = state.save

    def killed(parts, step):
        waited = save(parts, step)
        if step == 6:
            parts.checkpoints.finish()
            raise KeyboardInterrupt
        return waited

    with monkeypatch.context() as patched:
        patched.setattr(state, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*SPIKES, "optim.steps=10")
    assert run(*SPIKES, "optim.steps=10") == 10
    assert_same_model(whole / "final", run.folder / "final")
    assert [row["rows"] for row in metrics(run)][4:8] == [[[8, 9]], [[12, 13]], [[16, 17]], [[18, 19]]]


def test_roll_backs_are_bounded(run, monkeypatch):
    add_spike(monkeypatch, {8, 10, 12})
    with pytest.raises(RunStopped, match=r"is a spike, above .*optim\.max_roll_backs=2"):
        run(*SPIKES, "optim.max_roll_backs=2")
