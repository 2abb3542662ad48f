"""Exclusive file locks that the kernel releases when their holder dies, and a warning where a file system has none.

Lustre mounted without `flock`, some FSx and EFS mounts and some FUSE file systems answer ENOSYS, EOPNOTSUPP or ENOLCK.
Nobody can be kept out there, so the work goes on and the user is told not to start two programs at a time.
"""

import fcntl
import os
from enum import Enum
from pathlib import Path
from typing import IO, Any

from clex_train.utils import log

logger = log.get(__name__)


class Lock(Enum):
    taken = "taken"
    busy = "busy"
    unsupported = "unsupported"


def try_lock(file: IO[Any], path: Path, advice: str) -> Lock:
    """Take an exclusive lock on an open file without waiting.

    Args:
        file: open for writing; closing it releases the lock.
        path: its name, for the warning.
        advice: what the user has to see to where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.busy
    except OSError as error:
        if os.environ.get("RANK", "0") == "0":  # once, not on every rank of a launch
            logger.warning("%s: this file system has no locks (%s); %s", path, error.strerror, advice)
        return Lock.unsupported
    return Lock.taken
