"""Exclusive file locks that the kernel releases when the holder dies, with a warning where a file system has none.

Lustre mounted without `flock`, some FSx and EFS mounts and some FUSE file systems answer ENOSYS, EOPNOTSUPP or ENOLCK.
Exclusion is impossible there, so work continues and the user is warned not to start two programs at once.
"""

import fcntl
import os
from enum import Enum
from pathlib import Path
from typing import IO, Any

from clex_train.utils import log

logger = log.get(__name__)


class Lock(Enum):
    """Outcomes of trying to lock a file."""

    taken = "taken"
    busy = "busy"
    unsupported = "unsupported"


def try_lock(file: IO[Any], path: Path, advice: str) -> Lock:
    """Try to take an exclusive lock on an open file, without waiting.

    Args:
        file: open for writing; closing it releases the lock.
        path: its name, for the warning.
        advice: what the user must take care of where the file system has no locks.
    """
    try:
        # `flock`, not `lockf`: POSIX locks vanish when the process closes any other descriptor of the file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.busy
    except OSError as error:
        # Once per launch, not once per rank.
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s: this file system has no locks (%s); %s", path, error.strerror, advice)
        return Lock.unsupported
    return Lock.taken
