"""A checkpoint for another number of ranks: DeepSpeed's universal format, one file per parameter and optimizer moment.

    python -m clex_train.checkpoint.universal CHECKPOINT FOLDER     what rank 0 starts, in a process of its own

The conversion is DeepSpeed's (`deepspeed.checkpoint.ds_to_universal`; Universal Checkpointing, arXiv 2406.18820). What
its loading under ZeRO-3 gets wrong is put right here: every group takes the settings of the first one (weight decay on
vectors too), and all sub-groups share one tensor of the step, which each of them then advances.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from clex_train.checkpoint.safe_load import without_code
from clex_train.utils import distributed, files, log
from clex_train.utils.errors import ConfigError, StopRequested

logger = log.get(__name__)

FOLDER = "universal"
PATIENCE = 1.0
WORKERS = 2
STOPPING = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
"""Exit codes of a conversion that was asked to end, as DeepSpeed's launcher asks each process below a rank."""
BAR = re.compile(r"\d+%\||\d+it \[")
"""A line of a progress bar, which says nothing about a failure."""


def convert(checkpoint: Path, interrupted: Callable[[], bool] | None = None) -> Path:
    """Rank 0 converts a verified checkpoint beside it while the others wait; returns the folder of both. Collective.

    Raises `ValueError` with DeepSpeed's last word when it cannot be converted, on every rank; `StopRequested` when
    `interrupted` says so on a rank, or a signal to the process group ended the conversion.
    """
    target, beside = checkpoint.with_name(FOLDER), checkpoint.with_name(f"converting_{FOLDER}")
    with tempfile.TemporaryFile("w+") as said:
        process = _start(checkpoint, beside, said) if distributed.is_main() else None
        stopped = False
        # In turns of a second, so that a conversion may take longer than a collective may wait.
        while distributed.any_rank(process is not None and not _ended(process)):
            if stopped := distributed.any_rank(interrupted is not None and interrupted()):
                break
        asked = interrupted is not None and interrupted()
        stopped = stopped or distributed.any_rank(process is not None and _was_stopped(process, asked))
        if process and process.poll() != 0:
            _kill_group(process)
        failure = distributed.broadcast_object(_conclude(process, said, beside, target) if process else None)
    if stopped:
        if distributed.is_main():
            discard(checkpoint.parent)
        raise StopRequested(
            f"stopped while {checkpoint} was being converted for {distributed.world_size()} ranks; it is intact; "
            "the same command goes on"
        )
    if failure is not None:
        raise ConfigError(
            f"checkpoint {checkpoint}",
            None,
            f"cannot be converted for {distributed.world_size()} ranks ({failure}); launch as many ranks as wrote it",
        )
    return target


def discard(checkpoints: Path) -> None:
    """Remove what conversions left; on one rank."""
    for name in (FOLDER, f"converting_{FOLDER}"):
        files.remove_folder(checkpoints / name)


@contextmanager
def universal_loading(engine: Any) -> Iterator[None]:
    """Within, `engine.load_checkpoint` reads the universal format, and every group keeps its own settings."""
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
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _start(checkpoint: Path, beside: Path, said: IO[str]) -> subprocess.Popen[bytes]:
    logger.info("converting %s for %d ranks; all ranks wait", checkpoint, distributed.world_size())
    discard(checkpoint.parent)
    command = [sys.executable, "-m", "clex_train.checkpoint.universal", str(checkpoint), str(beside / checkpoint.name)]
    # In a session of its own, where no terminal's signal reaches it; it ends when its standard input does, with this
    # process.
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        start_new_session=True,
    )


def _was_stopped(process: subprocess.Popen[bytes], asked: bool) -> bool:
    """Tell whether a conversion failed because the run, or it, was asked to stop."""
    code = process.poll()
    return code in STOPPING or (code is not None and code != 0 and asked)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a conversion that is not wanted any more, with workers that may have outlived it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return False
    return True


def _conclude(process: subprocess.Popen[bytes], said: IO[str], beside: Path, target: Path) -> str | None:
    """Return what went wrong, in one line, or None once the folder stands under its name."""
    if process.returncode == 0:
        beside.rename(target)
        return None
    files.remove_folder(beside)
    said.seek(0)
    lines = [line for line in said.read().splitlines() if line.strip() and not BAR.search(line)]
    if process.returncode < 0:
        return f"its process was ended by {signal.Signals(-process.returncode).name}, as where memory is short"
    return lines[-1].strip() if lines else f"its process ended with {process.returncode}"


def _end_with_parent() -> None:
    """Kill this process group once standard input is closed: whoever started the conversion is gone."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from deepspeed.checkpoint import ds_to_universal

    given.folder.mkdir(parents=True)
    with without_code(given.checkpoint):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(given.checkpoint),
                output_folder=str(given.folder),
                num_extract_workers=WORKERS,
                num_merge_workers=WORKERS,
                keep_temp_folder=False,
                strict=True,
                # Stages 1 and 2 ask for a description of tensor parallelism, of which there is none.
                inject_missing_state=True,
            )
        )


if __name__ == "__main__":
    _main()
