"""Whole runs through DeepSpeed's launcher: loss curves by number of ranks, interruptions, and the final model."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from clex_train.cli import average as program
from clex_train.export import average
from tests.export.test_average import assert_is_mean
from tests.helpers.ports import free_port
from tests.helpers.same_models import assert_same_model
from tests.helpers.warm_processes import Program, rank_variables

CLEX = ("scaling=clex", "scaling.lr_scale=1.0", "scaling.t_max=4", "checkpoint.every=5", "checkpoint.keep_last=8")


@pytest.fixture(scope="session")
def one_rank(launcher):
    """Train 20 steps of CLEX on one rank, with accumulation 2, uninterrupted."""
    done = launcher.run(1, "one", *CLEX, "engine.micro_batch=4")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def two_ranks(launcher):
    """Train with the same global batch on two ZeRO-3 ranks, accumulation 4, uninterrupted."""
    done = launcher.launch(2, "two", *CLEX, "engine.micro_batch=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.timeout(600)
def test_two_ranks_reproduce_the_loss_curve_of_one(launcher, one_rank, two_ranks):
    one, two = (torch.tensor(launcher.figures(name, "loss")) for name in ("one", "two"))
    assert len(one) == len(two) == 20
    assert ((one - two).abs() / one).max() < 1e-5
    one, two = (torch.tensor(launcher.figures(name, "grad_norm")) for name in ("one", "two"))
    assert ((one - two).abs() / one).max() < 1e-3
    one, two = (torch.tensor(launcher.figures(name, "ode_grad_norm")) for name in ("one", "two"))
    # The field's gradient is a sum over positions in which most of each pair cancels, so rounding is as large in a step
    # with a small norm as in one with a large norm.
    assert (one - two).abs().max() / one.max() < 1e-3
    assert launcher.figures("one", "t") == launcher.figures("two", "t")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "ranks", "micro_batch"), [("one", 1, 4), ("two", 2, 1)])
def test_a_run_killed_in_the_middle_ends_bitwise_equal(launcher, one_rank, two_ranks, name, ranks, micro_batch):
    overrides = (*CLEX, f"engine.micro_batch={micro_batch}")
    killed = f"{name}_killed"
    # On a busy machine the kill may come too late; then kill another run.
    while not _kill_after(launcher, ranks, killed, 12, overrides):
        shutil.rmtree(launcher.folder / killed)
    # Resumed as a module, so that both forms of the command take part in one run.
    resume = launcher.launch_module if ranks > 1 else launcher.run
    done = resume(ranks, killed, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed step" in done.stderr
    for key in ("loss", "t", "grad_norm", "ode_grad_norm"):
        assert launcher.figures(killed, key) == launcher.figures(name, key), key
    assert_same_model(launcher.folder / killed / "final", launcher.folder / name / "final")


def test_the_final_model_loads_in_one_call_with_its_table(launcher, one_rank):
    from clex_train.config.model import ModelConfig
    from clex_train.models.load import load_for_evaluation

    loaded = load_for_evaluation(ModelConfig(path=str(launcher.folder / "one" / "final")))
    assert loaded.context_len == 32
    assert loaded.table is not None
    assert loaded.table.t.tolist() == [1.0, 2.0, 3.0, 4.0]
    with torch.no_grad():
        assert loaded.model(torch.arange(100)[None]).logits.isfinite().all()


def test_the_final_evaluation_is_in_the_metrics_and_in_a_file(launcher, one_rank):
    for length in (32, 64, 128):
        (value,) = launcher.figures("one", f"perplexity/trained/one_shot/{length}")
        assert 1 < value < 1e4
    assert (launcher.folder / "one" / "evaluation" / "step_20.json").exists()


def test_the_mean_of_checkpoints_of_two_zero3_ranks_equals_one_by_hand(launcher, two_ranks, tmp_path):
    run, output = launcher.folder / "two", tmp_path / "mean"
    program.write(average.plan(run, 3), output)
    assert_is_mean(output, run, [10, 15, 20])


def test_a_finished_run_is_not_changed(launcher, one_rank):
    before = launcher.figures("one", "loss")
    done = launcher.run(1, "one", *CLEX, "engine.micro_batch=4")
    assert done.returncode == 0
    assert launcher.figures("one", "loss") == before


def _kill_after(launcher, ranks: int, name: str, steps: int, overrides: tuple[str, ...]) -> bool:
    """Start a run and kill all its processes after `steps` steps of metrics; return True if steps were left."""
    port, command = free_port(), launcher.program(name, *overrides)
    processes = [Program(command, **rank_variables(rank, ranks, port)) for rank in range(ranks)]
    metrics = Path(launcher.folder / name / "metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= steps):
        assert not any(process.process.exitcode for process in processes), "the run failed"
        time.sleep(0.005)
    for process in processes:
        process.kill()
    return len(launcher.figures(name, "loss")) < 20
