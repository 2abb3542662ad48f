"""The id of a run in a back end, kept in its folder so that a resumed run continues there."""

import re
import secrets
from contextlib import suppress
from pathlib import Path

from clex_train.utils import files, log

logger = log.get(__name__)

MOST_BYTES = 256
"""Largest file with an id that is read."""
ID = re.compile(r"[A-Za-z0-9_.,=+-]{1,128}")
MOST_PREFIX = 100
"""Characters of a prefix."""


def run_id(path: Path, prefix: str = "") -> str:
    """Read the run's id from the file, or create one, beginning with `prefix`, when it is missing or damaged."""
    if path.exists():
        with suppress(files.BadFile):
            content = files.read_regular(path, within=path.parent, most=MOST_BYTES).decode("utf-8", "replace")
            if known := ID.fullmatch(content.strip()):
                return known[0]
        logger.warning("%s is damaged; moved to %s, starting a new run there", path, files.quarantine(path).name)
    plain = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", prefix)[:MOST_PREFIX]
    created = f"{plain}{secrets.token_hex(4)}"
    # Durable before the back end sees it: a run killed in between must find its own run there again.
    files.write_atomically(path, created + "\n")
    return created
