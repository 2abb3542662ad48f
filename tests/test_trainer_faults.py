"""What the loop does when a step goes wrong, in one process with the real engine and a tiny model."""

import json
import math

import pytest
import torch
from composing import composed

import train
from clex_train import trainer
from clex_train.cli import console
from clex_train.faults import RunStopped


@pytest.fixture
def run(tmp_path, tiny_store, tiny_architecture):
    """train.run on a tiny model, without evaluation unless an override asks for it."""

    def start(*overrides: str) -> int:
        return train.run(
            composed(
                "+experiment=tiny_base",
                f"output_dir={tmp_path / 'run'}",
                f"data.path={tiny_store}",
                f"model.config={tiny_architecture}",
                "model.context_len=32",
                "data.seq_len=32",
                "evaluation=never",
                "evaluation.lengths=[32,64]",
                "scaling=clex",
                "optim.batch_rows=2",
                "optim.steps=8",
                "checkpoint.every=2",
                *overrides,
            )
        )

    start.folder = tmp_path / "run"
    return start


def metrics(run) -> list[dict]:
    """The lines of steps and evaluations."""
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "save_seconds" not in line]


def spoil(monkeypatch, steps: set[int], value: float = math.nan) -> None:
    """Multiply the loss of these steps (1-based) by `value`, as a bad batch or a broken kernel would."""
    forward_backward, calls = trainer.forward_backward, [0]

    def spoilt(*args):
        calls[0] += 1
        if calls[0] not in steps:
            return forward_backward(*args)
        embedding = args[0].engine.module.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda module, inputs, output: output * value)
        try:
            return forward_backward(*args)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer, "forward_backward", spoilt)


def test_a_step_that_is_not_finite_is_skipped_by_model_and_ode_alike(run, monkeypatch):
    spoil(monkeypatch, {3})
    assert run() == 8
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[2]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in rows[3:]), "the weights stayed whole"


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_last_checkpoint(run, monkeypatch):
    spoil(monkeypatch, {5, 6})
    with pytest.raises(RunStopped, match=r"step 6: loss nan.*the last checkpoint is .*step_4"):
        run("optim.max_bad_steps=2")
    assert not (run.folder / "checkpoints" / "step_6").exists()


def test_a_field_that_breaks_its_bound_stops_before_it_is_saved(run, capsys):
    with pytest.raises(RunStopped, match=r"step \d: .*scaling\.max_residual.*another output_dir") as stopped:
        run("scaling.lr_scale=1", "optim.lr=0.05", "scaling.max_residual=1e-3")
    assert console.report(stopped.value) == console.STOPPED
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: step ")
    for state in (run.folder / "checkpoints").glob("step_*/ode.pt"):
        assert torch.load(state, weights_only=True)["clex"]["down"].isfinite().all()


def test_a_run_killed_between_saving_and_evaluating_evaluates_on_resume(run, monkeypatch):
    evaluated = []
    from clex_train.evaluation.training import TrainingEvaluation

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
    monkeypatch.setattr(trainer, "train", None)
    assert run() == 8
    assert (run.folder / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_weights_with_a_field_are_not_trained_on_without_it(run):
    run()
    with pytest.raises(ValueError, match=r"scaling\.name=none: .* holds a CLEX field"):
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
def test_memory_that_runs_out_in_a_step_becomes_the_estimate_and_what_to_turn_down(run, monkeypatch, capsys, error):
    def full(parts, batch, spectrum, weight=1.0):
        raise error

    monkeypatch.setattr(trainer, "forward_backward", full)
    with pytest.raises(RunStopped) as stopped:
        run()
    assert console.report(stopped.value) == console.STOPPED
    said = capsys.readouterr().err
    assert "error: out of memory on rank 0: " in said
    for part in ("parameters", "gradients", "optimizer", "activations", "logits", "ODE", "total"):
        assert f"\n  {part} " in said, part
    for remedy in ("engine.micro_batch=1", "engine.activation_checkpointing=true", "engine.offload=optimizer"):
        assert remedy in said, remedy
    assert "Traceback" not in said
