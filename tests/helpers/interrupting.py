"""Sends signals to a launch at seeded moments, as a terminal, a scheduler or the kernel does, and looks at its end."""

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers import environments

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
ORPHAN_SECONDS = float(os.environ.get("INTERRUPT_SECONDS", "5"))
"""How long a process may outlive its launch; more on a machine that has other work."""
PATIENCE = 1800
"""Seconds that a launch may take on a machine that has other work, against hanging alone."""
TRIALS = int(os.environ.get("INTERRUPT_TRIALS", "4"))
"""How many signals a test sends."""
SEED = int(os.environ.get("INTERRUPT_SEED", "0"))
TRACEBACK = re.compile(
    r"Traceback \(most recent call last\):\n(?:.*\n)*?(?=\S*\w+(?:Error|Interrupt|Exception|Exit)\b)"
)


@dataclass
class Trial:
    """One signal: which, when it hit and what came of it."""

    number: signal.Signals
    moment: str
    seconds: float
    code: int
    output: str
    orphans: list[str]
    took: float


@dataclass
class Interrupter:
    """Launches one command again and again, with a signal in each launch, until its result is there."""

    command: list[str]
    result: Path
    log: Path
    moments: dict[str, object]
    """Functions of the launch that return when its moment has come, by name."""
    generator: random.Random
    trials: list[Trial] = field(default_factory=list)

    def run(self, wanted: int) -> None:
        """Interrupt `wanted` launches, or fewer if the result is there before."""
        for index in range(wanted):
            if self.result.exists():
                return
            number = SIGNALS[index % len(SIGNALS)]
            moment = self.generator.choice(list(self.moments))
            trial = self.interrupt(number, moment)
            # At once: what a later failure of the test has to say is not all that was found.
            print(describe(trial), flush=True)
            self.trials.append(trial)

    def finish(self) -> str:
        """Run the same command to its end; returns what it printed."""
        done = subprocess.run(
            self.command,
            cwd=ROOT,
            env=environments.of_a_launch(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not tracebacks_of_ours(done.stdout + done.stderr)
        return done.stdout + done.stderr

    def interrupt(self, number: signal.Signals, moment: str) -> Trial:
        """One launch and one signal: to its whole group, as a terminal sends it; SIGKILL to one of its processes."""
        with self.log.open("w") as log:
            process = start(self.command, log)
        started, own = time.monotonic(), psutil.Process(process.pid)
        try:
            self.moments[moment](process)
            known = {process.pid: own, **descendants(process)}
            hit = time.monotonic()
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if number is signal.SIGKILL:
                    known[self.generator.choice(list(known))].kill()
                else:
                    os.killpg(process.pid, number)
            code = process.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
        ended = time.monotonic()
        _, alive = psutil.wait_procs(known.values(), timeout=ORPHAN_SECONDS)
        orphans = [" ".join(_command(each)) for each in alive]
        psutil.wait_procs(alive, timeout=300)
        return Trial(number, moment, hit - started, code, self.log.read_text(), orphans, ended - hit)


def start(command: list[str], log) -> subprocess.Popen:
    """Begin a program in a group of its own, with the signals of an interactive shell."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environments.of_a_launch(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A test run in the background of a script ignores SIGINT, and its children with it.
        preexec_fn=take_signals,
    )


def take_signals() -> None:
    """Undo what `nohup` or a script's background has left to this process."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def descendants(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Every process below a launch."""
    try:
        return {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return {}


def tracebacks_of_ours(output: str) -> list[str]:
    """Tracebacks with a frame of this repository; those of launchers have none."""
    return [found[0] for found in TRACEBACK.finditer(output) if f'File "{ROOT}/' in found[0].replace("/.venv/", "|")]


def describe(trial: Trial) -> str:
    """One line: which signal, when, and what came of it."""
    theirs, ours = trial.output.count("Traceback (most recent"), len(tracebacks_of_ours(trial.output))
    return (
        f"  {trial.number.name:<8}{trial.moment:<17}{trial.seconds:6.1f} s after the launch: code {trial.code}, "
        f"{trial.took:.1f} s later; {theirs} tracebacks, {ours} of ours, {len(trial.orphans)} orphans"
    )


def report(trials: list[Trial]) -> None:
    """Print how many signals there were of each kind; shown with `-s`, as is a line for each."""
    print(f"\n{len(trials)} signals: {dict(Counter(f'{trial.number.name} {trial.moment}' for trial in trials))}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ["gone meanwhile"]
