"""Kill a two-rank run repeatedly at seeded moments and restart it with the same command until it finishes.

This module does not depend on the format of checkpoints: a folder in `checkpoints/` with another name than `step_<N>`
means that one is being written, and `final/` that the run is finished.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.distributed.distributed_runs import ROOT, Launcher
from tests.helpers import environments

VICTIMS = ("rank 0", "rank 1", "launcher", "launcher's child")
MOMENTS = ("starting", "a step", "a save", "a save", "an evaluation")
LIFE_SECONDS = 600.0


@dataclass
class Kill:
    """One SIGKILL: its victim and time, in steps of the run and seconds of that launch."""

    victim: str
    moment: str
    step: int
    seconds: float


@dataclass
class Life:
    """One launch of the run, from its first process to its last."""

    process: subprocess.Popen
    folder: Path
    started: float = field(default_factory=time.monotonic)
    began: float = field(default_factory=time.time)

    def ranks(self) -> list[psutil.Process]:
        """Return the training processes that the launcher has started so far, in order of rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "train.py" in child.cmdline() and "--local_rank" in " ".join(child.cmdline()):
                    found[child.environ().get("RANK", "?")] = child
            except psutil.Error:
                continue
        return [found[rank] for rank in sorted(found) if rank.isdigit()]

    def victim(self, name: str) -> psutil.Process:
        """Return the process of this name."""
        above = psutil.Process(self.process.pid)
        if name == "launcher":
            return above
        return above.children()[0] if name == "launcher's child" else self.ranks()[int(name[-1])]

    def is_saving(self) -> bool:
        """Return True while this launch writes a checkpoint; ignore unfinished ones of earlier launches."""
        with suppress(FileNotFoundError):
            for path in (self.folder / "checkpoints").glob("*"):
                if path.is_dir() and not path.name.startswith("step_") and path.stat().st_mtime > self.began:
                    return True
        return False

    def poll_while_running(self) -> Iterator[None]:
        """Iterate for as long as the launch runs."""
        while self.process.poll() is None:
            assert time.monotonic() - self.started < LIFE_SECONDS, "the launch hangs"
            yield


def run_with_kills(launcher: Launcher, name: str, kills: int, seed: int, overrides: tuple[str, ...]) -> list[Kill]:
    """Launch until the run is finished, with at most one kill a launch; return the kills that hit."""
    generator, done = random.Random(seed), []
    folder = launcher.folder / name
    for life in range(3 * kills + 3):
        launch = _launch(launcher, name, life, overrides)
        try:
            if len(done) < kills:
                done += _kill_once(launch, VICTIMS[life % len(VICTIMS)], generator)
            launch.process.wait(LIFE_SECONDS)
        except BaseException:
            os.killpg(launch.process.pid, signal.SIGKILL)
            raise
        # Ranks whose launcher was killed may still be saving; the next launch has to wait for them.
        if (folder / "final").exists() and not launch_is_alive(folder):
            return done
    raise AssertionError(f"{name} was not finished after {3 * kills + 3} launches")


def _launch(launcher: Launcher, name: str, life: int, overrides: tuple[str, ...]) -> Life:
    with (launcher.folder / f"{name}_{life}.log").open("w") as log:
        process = subprocess.Popen(
            launcher.command(2, name, *overrides),
            cwd=ROOT,
            env=environments.launch_environment(),
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return Life(process, launcher.folder / name)


def _kill_once(launch: Life, victim: str, generator: random.Random) -> list[Kill]:
    """Kill a process of this launch; return no kill if the launch ended before its moment."""
    moment = generator.choice(MOMENTS)
    if not _wait_until(launch, lambda: len(launch.ranks()) == 2):
        return []
    target = launch.victim(victim)
    if not _wait_for_moment(launch, moment, generator):
        return []
    try:
        target.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return []
    step = (last_row(launch.folder) or {"step": 0})["step"]
    return [Kill(victim, moment, step, time.monotonic() - launch.started)]


def launch_is_alive(folder: Path) -> bool:
    """Return True while any process uses a run folder."""
    return any(
        f"output_dir={folder}" in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    )


def _wait_for_moment(launch: Life, moment: str, generator: random.Random) -> bool:
    """Wait for the moment of the kill; return False if the launch ended before."""
    wait = {
        "starting": lambda: True,
        "a step": lambda: _wait_for_steps(launch, generator.randint(1, 3)),
        "a save": lambda: _wait_until(launch, launch.is_saving),
        "an evaluation": lambda: (
            _wait_for_steps(launch, 1) and _wait_until(launch, lambda: _will_evaluate(launch.folder))
        ),
    }[moment]
    pause = {"starting": 5.0, "a step": 0.05, "a save": 0.01, "an evaluation": 0.02}[moment]
    reached = wait()
    time.sleep(generator.uniform(0, pause))
    return reached and launch.process.poll() is None


def _wait_until(launch: Life, condition) -> bool:
    for _ in launch.poll_while_running():
        if condition():
            return True
        time.sleep(0.001)
    return False


def _wait_for_steps(launch: Life, steps: int) -> bool:
    """Wait for `steps` new lines of metrics; a resumed launch first drops the lines of steps that it repeats."""
    path = launch.folder / "metrics.jsonl"
    last, seen = None, 0
    for _ in launch.poll_while_running():
        now = path.stat().st_size if path.exists() else 0
        seen += last is not None and now > last
        last = now
        if seen >= steps:
            return True
        time.sleep(0.001)
    return False


def _will_evaluate(folder: Path) -> bool:
    """Return True if the last line of metrics is of a step with an evaluation, which every fourth has."""
    row = last_row(folder)
    return row is not None and "loss" in row and row["step"] % 4 == 0


def last_row(folder: Path) -> dict | None:
    """Return the last complete line of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    for line in reversed(path.read_text().splitlines() if path.exists() else []):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None
