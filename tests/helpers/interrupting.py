"""Send signals to launches at seeded moments, like a terminal, a scheduler or the kernel, and record the outcome."""

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
"""Seconds that a process may outlive its launch; more on a busy machine."""
PATIENCE = 1800
"""Timeout of a launch in seconds, long enough for a busy machine: it only catches hangs."""
TRIALS = int(os.environ.get("INTERRUPT_TRIALS", "4"))
"""Number of signals that a test sends."""
SEED = int(os.environ.get("INTERRUPT_SEED", "0"))
TRACEBACK = re.compile(
    r"Traceback \(most recent call last\):\n(?:.*\n)*?(?=\S*\w+(?:Error|Interrupt|Exception|Exit)\b)"
)


@dataclass
class Trial:
    """One signal: its number, its time and the outcome."""

    number: signal.Signals
    moment: str
    seconds: float
    code: int
    output: str
    orphans: list[str]
    took: float


@dataclass
class Interrupter:
    """Launch one command repeatedly, with a signal in each launch, until its result exists."""

    command: list[str]
    result: Path
    log: Path
    moments: dict[str, object]
    """Functions of the launched process, by name, that return when it is time for the signal."""
    generator: random.Random
    trials: list[Trial] = field(default_factory=list)

    def run(self, wanted: int) -> None:
        """Interrupt `wanted` launches, or fewer if the result exists before."""
        for index in range(wanted):
            if self.result.exists():
                return
            number = SIGNALS[index % len(SIGNALS)]
            moment = self.generator.choice(list(self.moments))
            trial = self.interrupt(number, moment)
            # Printed at once, so that a later failure of the test does not hide it.
            print(describe(trial), flush=True)
            self.trials.append(trial)

    def finish(self) -> str:
        """Run the same command to its end; return its output."""
        done = subprocess.run(
            self.command,
            cwd=ROOT,
            env=environments.launch_environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not tracebacks_of_ours(done.stdout + done.stderr)
        return done.stdout + done.stderr

    def interrupt(self, number: signal.Signals, moment: str) -> Trial:
        """Launch once and send one signal to the whole group, as a terminal does; SIGKILL to one random process."""
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
    """Start a program in a new process group, with the signal handling of an interactive shell."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environments.launch_environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Processes started in the background of a script inherit an ignored SIGINT.
        preexec_fn=restore_signals,
    )


def restore_signals() -> None:
    """Restore the default signal handling that `nohup` or a background job disables."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def descendants(process: subprocess.Popen) -> dict[int, psutil.Process]:
    """Return every descendant of a launch by process id."""
    try:
        return {child.pid: child for child in psutil.Process(process.pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return {}


def tracebacks_of_ours(output: str) -> list[str]:
    """Return the tracebacks with a frame in this repository, which those of launchers lack."""
    return [found[0] for found in TRACEBACK.finditer(output) if f'File "{ROOT}/' in found[0].replace("/.venv/", "|")]


def describe(trial: Trial) -> str:
    """Describe in one line the signal, its time and the outcome."""
    theirs, ours = trial.output.count("Traceback (most recent"), len(tracebacks_of_ours(trial.output))
    return (
        f"  {trial.number.name:<8}{trial.moment:<17}{trial.seconds:6.1f} s after the launch: code {trial.code}, "
        f"{trial.took:.1f} s later; {theirs} tracebacks, {ours} of ours, {len(trial.orphans)} orphans"
    )


def report(trials: list[Trial]) -> None:
    """Print the number of signals of each kind; shown with `-s`."""
    print(f"\n{len(trials)} signals: {dict(Counter(f'{trial.number.name} {trial.moment}' for trial in trials))}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return ["gone meanwhile"]
