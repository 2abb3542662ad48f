"""Resuming on another number of ranks through DeepSpeed's universal format: one file per parameter and moment.

The conversion is DeepSpeed's own (`deepspeed.checkpoint.ds_to_universal`; Universal Checkpointing, arXiv 2406.18820).
It runs in a subprocess of rank 0 (`convert.py`).
`universal_loading` corrects two errors of its loading under ZeRO-3.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from clex_train.utils import distributed, files, log
from clex_train.utils.errors import ConfigError, StopRequested

logger = log.get(__name__)

FOLDER = "universal"
PATIENCE = 1.0
"""Seconds between two checks of the subprocess."""
STOPPING = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""Exit codes of a conversion ended by a signal. DeepSpeed's launcher signals every process below a rank."""
BAR = re.compile(r"\d+%\||\d+it \[")
"""A line of a progress bar, never the cause of a failure."""


def convert(checkpoint: Path, interrupted: Callable[[], bool] | None = None) -> Path:
    """Convert a verified checkpoint on rank 0 and return the folder of the result. Collective.

    Raises `ConfigError` on every rank, with DeepSpeed's last line, when the conversion fails. Raises `StopRequested`
    when `interrupted` is true on a rank, or a signal ended the conversion.
    """
    target, staging = checkpoint.with_name(FOLDER), checkpoint.with_name(f"converting_{FOLDER}")
    with tempfile.TemporaryFile("w+") as output:
        process = _start(checkpoint, staging, output) if distributed.is_main() else None
        stopped = False
        # Poll with short collectives: a conversion can take longer than the process group's timeout.
        while distributed.any_rank(process is not None and not _ended(process)):
            if stopped := distributed.any_rank(interrupted is not None and interrupted()):
                break
        # Ctrl-C reaches this rank and the subprocess at once; if the subprocess dies first, its exit code alone looks
        # like a failure.
        stop_requested = interrupted is not None and interrupted()
        stopped = stopped or distributed.any_rank(process is not None and _was_stopped(process, stop_requested))
        if process and process.poll() != 0:
            _kill_group(process)
        failure = distributed.broadcast_object(_conclude(process, output, staging, target) if process else None)
    if stopped:
        if distributed.is_main():
            discard(checkpoint.parent)
        raise StopRequested(
            f"stopped while {checkpoint} was being converted for {distributed.world_size()} ranks; it is intact; "
            "the same command resumes it"
        )
    if failure is not None:
        raise ConfigError(
            f"checkpoint {checkpoint}",
            None,
            f"cannot be converted for {distributed.world_size()} ranks ({failure}); launch as many ranks as wrote it",
        )
    return target


def discard(checkpoints: Path) -> None:
    """Remove converted and half-converted checkpoints. Call it on one rank."""
    for name in (FOLDER, f"converting_{FOLDER}"):
        files.remove_folder(checkpoints / name)


@contextmanager
def universal_loading(engine: Any) -> Iterator[None]:
    """Make `engine.load_checkpoint` read the universal format, and undo two errors of it under ZeRO-3."""
    # DeepSpeed 0.19 restores the first parameter group's settings to all groups: weight decay on norms and biases too.
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    _own_steps(engine.optimizer.optimizer)


def _own_steps(optimizer: torch.optim.Optimizer) -> None:
    # DeepSpeed 0.19 gives all sub-groups one `step` tensor. Each sub-group increments it, which breaks Adam's bias
    # correction.
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _start(checkpoint: Path, staging: Path, output: IO[str]) -> subprocess.Popen[bytes]:
    logger.info("converting %s for %d ranks; all ranks wait", checkpoint, distributed.world_size())
    discard(checkpoint.parent)
    command = [sys.executable, "-m", "clex_train.checkpoint.convert", str(checkpoint), str(staging / checkpoint.name)]
    # In a session of its own, so that Ctrl-C in the terminal does not reach it and the run decides when it ends. The
    # pipe on its standard input closes when this process dies, even by SIGKILL, and ends it too.
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=output,
        start_new_session=True,
    )


def _was_stopped(process: subprocess.Popen[bytes], stop_requested: bool) -> bool:
    """Return True if a conversion failed because the run, or the conversion itself, received a stop signal."""
    code = process.poll()
    return code in STOPPING or (code is not None and code != 0 and stop_requested)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a conversion together with its worker processes."""
    # Workers outlive their parent when it dies by a signal, and would keep filling the disk.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    return True


def _conclude(process: subprocess.Popen[bytes], output: IO[str], staging: Path, target: Path) -> str | None:
    """Rename a finished conversion into place, or return its failure in one line."""
    if process.returncode == 0:
        staging.rename(target)
        return None
    files.remove_folder(staging)
    output.seek(0)
    lines = [line for line in output.read().splitlines() if line.strip() and not BAR.search(line)]
    if process.returncode < 0:
        return f"its process was killed by {signal.Signals(-process.returncode).name}, perhaps out of memory"
    return lines[-1].strip() if lines else f"its process exited with {process.returncode}"
