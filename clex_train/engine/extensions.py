"""Just-in-time build of DeepSpeed's C++ extensions, one process at a time and safe against stale locks.

torch's build waits for a file named `lock`, which a killed build leaves behind: every later launch then hangs silently.
Here the build is guarded by an `flock`, which the kernel releases when its owner dies. File systems without `flock`
have only torch's file.
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
    """Compile a DeepSpeed op for this machine's accelerator, unless it is built already or does not exist for it.

    Raises `RuntimeError`, chained to the compiler's message, when the build fails.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _get_build_directory

    builder = get_accelerator().create_op_builder(builder_class_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    _put_on_path(Path(sys.executable).parent)
    # Next to the folder: torch may delete and recreate the folder itself.
    with exclusive(folder.with_suffix(".flock"), builder.name) as is_locked:
        if is_locked:
            # No live process is building, so any `lock` here is stale.
            (folder / "lock").unlink(missing_ok=True)
        if not any(folder.glob("*.so")):
            logger.info("compiling %s once for this machine, about a minute ...", builder.name)
        builder.load(verbose=False)


def _put_on_path(folder: Path) -> None:
    """Put the interpreter's own folder on PATH."""
    # torch runs `ninja` by name; pip installs it here, which is not on PATH unless the environment is activated.
    if str(folder) not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"


@contextmanager
def exclusive(path: Path, name: str) -> Iterator[bool]:
    """Take an exclusive `flock` on `path`, and log while another process has it.

    Yields False on a file system without locks, where another process may be building at the same time.
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
