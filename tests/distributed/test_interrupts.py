"""Signals at random moments in training, conversion and tokenizing: repeating the command gives the same bits.

INTERRUPT_TRIALS=20 python -m pytest -m slow -s tests/distributed/test_interrupts.py
"""

import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.chaos import last_row
from tests.distributed.distributed_runs import BIN, Launcher
from tests.helpers.interrupting import SEED, TRIALS, Interrupter, report, start, tracebacks_of_ours
from tests.helpers.ports import free_port
from tests.helpers.same_models import assert_same_model

STEPS = 12
OVERRIDES = (
    "scaling=clex",
    "scaling.t_max=4",
    "engine.micro_batch=1",
    "evaluation.every=6",
    "evaluation.lengths=[32,64]",
    "evaluation.num_windows=1",
    "engine.timeout=1",
    f"optim.steps={STEPS}",
)
CONVERTED = (*OVERRIDES[:-1], "optim.steps=6", "checkpoint.every=2", "checkpoint.keep_last=8", "optim.weight_decay=0.1")
STEP_NAMES = [f"step_{step}" for step in range(1, STEPS + 1)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200 + 240 * TRIALS)]


def launch_command(launcher: Launcher, launched_with: str, name: str) -> list[str]:
    """Return the command of a run under a launcher."""
    command = launcher.command(2 if launched_with == "deepspeed" else 1, name, *OVERRIDES)
    if launched_with == "torchrun":
        torchrun = [str(BIN / "torchrun"), "--nproc-per-node=2", f"--master-port={free_port()}"]
        return [*torchrun, *command[command.index("train.py") :]]
    return command


def moments(folder: Path, generator: random.Random) -> dict:
    """Return functions that wait for the moment of a signal: in the start, the steps or around the end of a run."""

    def rows() -> int:
        row = last_row(folder)
        return row["step"] if row else 0

    def starting(process) -> None:
        time.sleep(generator.uniform(0, 15))

    def training(process) -> None:
        before = rows()
        while process.poll() is None and rows() in (0, before):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 1))

    def ending(process) -> None:
        while process.poll() is None and rows() < STEPS:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.5))

    return {"starting": starting, "training": training, "training again": training, "ending": ending}


@pytest.fixture(scope="module")
def undisturbed(launcher) -> dict[int, Path]:
    """Train without signals; return run folders by number of ranks."""
    for ranks in (1, 2):
        done = launcher.run(ranks, f"left_alone_{ranks}", *OVERRIDES)
        assert done.returncode == 0, done.stderr
    return {ranks: launcher.folder / f"left_alone_{ranks}" for ranks in (1, 2)}


@pytest.mark.parametrize("launched_with", ["python", "torchrun", "deepspeed"])
def test_interrupted_training_ends_bitwise_equal(launcher, undisturbed, launched_with):
    generator, trials = random.Random(f"{SEED} {launched_with}"), []
    while len(trials) < TRIALS:
        name = f"{launched_with}_{len(trials)}"
        folder = launcher.folder / name
        log = launcher.folder / f"{name}.log"
        command = launch_command(launcher, launched_with, name)
        run = Interrupter(command, folder / "final", log, moments(folder, generator), generator)
        run.run(TRIALS - len(trials))
        trials += run.trials
        run.finish()
        report(run.trials)
        check_equal(folder, undisturbed[1 if launched_with == "python" else 2])
        steps = launcher.figures(name, "loss")
        assert steps == launcher.figures(f"left_alone_{1 if launched_with == 'python' else 2}", "loss"), (
            "each step once"
        )
    check_ends(trials, launched_with)


def check_equal(folder: Path, whole: Path) -> None:
    """Assert that final models are bitwise equal and that interrupted launches left no files."""
    assert_same_model(whole / "final", folder / "final")
    assert entries(folder) == entries(whole)
    assert {path.name for path in (folder / "checkpoints").iterdir()} <= {"latest", *STEP_NAMES}


def entries(folder: Path) -> set[str]:
    """List a run folder without the descriptions of the environment that each resumed launch adds."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("environment_step_")}


def check_ends(trials, launched_with: str) -> None:
    """Assert no traceback of ours and no orphans, and the documented exit codes if there is no launcher."""
    for trial in trials:
        assert not tracebacks_of_ours(trial.output), trial.output
        assert trial.orphans == [], trial.orphans
        if launched_with == "python":
            assert trial.code in (0, 75, -9, 130, -trial.number), (trial.number, trial.moment, trial.code)
            assert "Traceback" not in trial.output


@pytest.fixture(scope="module")
def stopped_run(launcher) -> Path:
    """Make a run of two ranks that stopped after four of six steps."""
    done = launcher.run(2, "stopped_run", *CONVERTED)
    assert done.returncode == 0, done.stderr
    folder = launcher.folder / "stopped_run"
    for name in ("final", "evaluation", "checkpoints/step_6"):
        shutil.rmtree(folder / name)
    (folder / "checkpoints" / "latest").write_text("step_4\n")
    return folder


def wait_for(words: str, log: Path, process) -> None:
    while process.poll() is None and words not in log.read_text():
        time.sleep(0.02)


def convert_undisturbed(command: list[str], log: Path) -> float:
    """Run to the end; return the seconds of the conversion."""
    with log.open("w") as file:
        process = start(command, file)
    wait_for("converting", log, process)
    began = time.monotonic()
    wait_for("resumed step 4", log, process)
    seconds = time.monotonic() - began
    assert process.wait(600) == 0, log.read_text()
    return seconds


def test_an_interrupted_conversion_to_one_rank_ends_bitwise_equal(launcher, stopped_run):
    generator, trials, log = random.Random(SEED), [], launcher.folder / "conversion.log"

    def command_on_copy(name: str) -> list[str]:
        shutil.copytree(stopped_run, launcher.folder / name)
        return launcher.command(1, name, *CONVERTED)

    seconds = convert_undisturbed(command_on_copy("converted"), log)

    def converting(process) -> None:
        wait_for("converting", log, process)
        time.sleep(generator.uniform(0, seconds))

    while len(trials) < TRIALS:
        name = f"converted_{len(trials)}"
        run = Interrupter(
            command_on_copy(name), launcher.folder / name / "final", log, {"converting": converting}, generator
        )
        run.run(min(4, TRIALS - len(trials)))
        # If an earlier signal came late, a checkpoint of one rank exists already and there is nothing to convert.
        trials += [trial for trial in run.trials if "converting" in trial.output]
        run.finish()
        check_equal(launcher.folder / name, launcher.folder / "converted")
        assert launcher.figures(name, "loss") == launcher.figures("converted", "loss"), "each step once"
    report(trials)
    for trial in trials:
        assert "Traceback" not in trial.output, trial.output
        assert trial.orphans == [], trial.orphans
        # 2: the converter or one of its workers was killed, which is reported in one line.
        allowed = (-signal.SIGKILL, 2) if trial.number is signal.SIGKILL else (75, 128 + trial.number)
        assert trial.code in allowed, (trial.number, trial.code, trial.output)


def test_interrupted_tokenizing_ends_with_the_same_bytes(tmp_path, tiny_store):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(6):
        (texts / f"{index}.txt").write_text(f"{index} the clocks were striking thirteen " * 200_000)
    generator = random.Random(SEED)

    def command(store: str) -> list[str]:
        verb = [sys.executable, "-m", "data_prep", "tokenize", "workers=2", "shard_mb=1", f"output={tmp_path / store}"]
        return [*verb, f"corpus.paths=[{texts}]", f"tokenizer={tiny_store / 'tokenizer'}", "corpus.name=tiny"]

    whole = Interrupter(command("whole"), tmp_path / "whole", tmp_path / "log", {}, generator)
    whole.finish()
    trials = []
    while len(trials) < TRIALS:
        store = tmp_path / f"store_{len(trials)}"
        moment = {"any": lambda process: time.sleep(generator.uniform(0, 25))}
        run = Interrupter(command(store.name), store, tmp_path / "log", moment, generator)
        run.run(TRIALS - len(trials))
        trials += run.trials
        run.finish()
        files = {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
        assert files == {path: (tmp_path / "whole" / path).read_bytes() for path in files}
        assert not list(tmp_path.glob("*.partial"))
    report(trials)
    for trial in trials:
        assert "Traceback" not in trial.output, trial.output
        assert trial.orphans == [], trial.orphans
        # 2: a worker was killed, which is reported in one line.
        assert trial.code in (0, 2, -9, 128 + trial.number, -trial.number), trial.code
