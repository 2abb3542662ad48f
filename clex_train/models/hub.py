"""Ask once whether the Hugging Face hub can be reached; where it cannot, only its cache on this machine is read.

The libraries repeat each of their requests for half a minute and print a line for each.
"""

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from clex_train.utils import log
from clex_train.utils.errors import first_line

TIMEOUT = 10
"""Seconds that the hub has to answer."""

logger = log.get(__name__)


def options(path: str) -> dict[str, Any]:
    """Return the arguments of every `from_pretrained` of a directory or hub name."""
    return {} if Path(path).is_dir() or unreachable() is None else {"local_files_only": True}


def why_not_read(path: str, error: BaseException) -> str:
    """Explain why a library could not read something of `path`, with the remedy if the hub is out of reach."""
    if Path(path).is_dir() or unreachable() is None:
        return first_line(error)
    return (
        f"the hub cannot be reached, {unreachable()}, and its cache here lacks it; download it where it can be "
        f"(`hf download {path}`), or give a directory"
    )


@cache
def unreachable() -> str | None:
    """Return the reason why the hub cannot be reached, None if it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of an HTTP library that differs between versions of huggingface_hub
        reason = first_line(error)
        logger.warning("%s cannot be reached (%s): only its cache on this machine is read", constants.ENDPOINT, reason)
        return reason
    return None
