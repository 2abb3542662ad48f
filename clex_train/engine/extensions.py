"""Builds the C++ extensions that DeepSpeed compiles at run time, one process at a time and never behind a stale lock.

torch's build waits for a file named `lock` and never removes one that a killed build left behind, so that every later
launch hangs without a word. Here an `flock` of ours, which the kernel releases when its holder dies, guards the build:
whoever holds it knows that a `lock` it finds is dead. Without `flock` torch's file is all there is.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clex_train.utils import log
from clex_train.utils.locks import Lock, try_lock

logger = log.get(__name__)

POLL_SECONDS = 0.2


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
    with exclusive(folder.with_suffix(".flock"), builder.name) as is_held:
        if is_held:
            (folder / "lock").unlink(missing_ok=True)
        if not any(folder.glob("*.so")):
            logger.info("compiling %s once for this machine, about a minute ...", builder.name)
        builder.load(verbose=False)


def _put_on_path(folder: Path) -> None:
    """ninja, installed beside this interpreter, is found although the environment was not activated."""
    if str(folder) not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


@contextmanager
def exclusive(path: Path, name: str) -> Iterator[bool]:
    """Hold an exclusive `flock` on `path`, saying whom it waits for when another process has it.

    Yields False where the file system has no locks: then another process may be building.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    advice = f"should the build of {name} hang, remove {path.with_suffix('') / 'lock'}, or set TORCH_EXTENSIONS_DIR"
    with path.open("w") as handle:
        start = time.monotonic()
        found = try_lock(handle, path, advice)
        if found is Lock.busy:
            logger.info("process %d waits while another one compiles %s (%s)", os.getpid(), name, path)
            while found is Lock.busy:
                time.sleep(POLL_SECONDS)
                found = try_lock(handle, path, advice)
            logger.info("process %d waited %.0f s for %s", os.getpid(), time.monotonic() - start, name)
        yield found is Lock.taken
