"""Processes of `deepspeed` and `torchrun` above this one: find them, and notice when they have died."""

import os
from pathlib import Path

import psutil

LAUNCHERS = ("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run")
"""Program or module names as they appear on a command line."""
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
"""Environment variables that `deepspeed` and `torchrun` set for their children."""


def launchers() -> list[psutil.Process]:
    """List the launcher processes above this one, nearest first."""
    # Several: `deepspeed` starts deepspeed.launcher.launch, which starts the ranks. A wrapper in between ends the list.
    found = []
    for process in psutil.Process().parents():
        try:
            if not is_launcher(process.cmdline()):
                break
        except psutil.Error:
            # The process has died meanwhile, or belongs to another user.
            break
        found.append(process)
    return found


def is_alive(process: psutil.Process) -> bool:
    """Return True if a process is running; a zombie is not."""
    # `is_running` compares start times, so a reused process id does not count; it is true for zombies, though.
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_orphan(found: list[psutil.Process]) -> bool:
    """Return True if the launcher of this process, or the launcher's own parent, died before this process looked."""
    # The kernel gives the children of a dead process to process 1.
    if not found:
        return os.getppid() == 1 and any(name in os.environ for name in SET_BY_LAUNCHERS)
    # The program `deepspeed` starts this module, which starts the ranks.
    return found[-1].ppid() == 1 and "deepspeed.launcher.launch" in found[-1].cmdline()


def is_launcher(arguments: list[str]) -> bool:
    """Return True if a command line starts `deepspeed` or `torchrun`."""
    # Among the first arguments only (python -m module); a training script may have the same words in its own.
    return any(Path(argument).name in LAUNCHERS for argument in arguments[:4])
