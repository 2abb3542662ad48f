"""Builds the C++ extensions that DeepSpeed compiles at run time, one process at a time and never behind a stale lock.

torch's build waits for a file named `lock` and never removes one that a killed build left behind, so that every later
launch hangs without a word. Here an `flock` of ours, which the kernel releases when its holder dies, guards the build:
whoever holds it knows that a `lock` it finds is dead.
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clex_train import log

logger = log.get(__name__)


def build(builder_class_name: str) -> None:
    """Compile one DeepSpeed op for this machine's accelerator unless it is there already; a no-op where it cannot be.

    Raises `RuntimeError` with the compiler's message in its chain when the build fails.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder(builder_class_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    _put_on_path(Path(sys.executable).parent)
    with exclusive(folder.with_suffix(".flock"), builder.name):
        (folder / "lock").unlink(missing_ok=True)
        if not any(folder.glob("*.so")):
            logger.info("compiling %s once for this machine, about a minute ...", builder.name)
        builder.load(verbose=False)


def _put_on_path(folder: Path) -> None:
    """ninja, installed beside this interpreter, is found although the environment was not activated."""
    if str(folder) not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


@contextmanager
def exclusive(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive `flock` on `path`, saying whom it waits for when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            start = time.monotonic()
            logger.info("process %d waits while another one compiles %s (%s)", os.getpid(), name, path)
            fcntl.flock(handle, fcntl.LOCK_EX)
            logger.info("process %d waited %.0f s for %s", os.getpid(), time.monotonic() - start, name)
        yield
