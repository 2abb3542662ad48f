"""Reachability of the Hugging Face hub, tested once; without it, only the local cache is read."""

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session

from clex_train.utils import log
from clex_train.utils.errors import first_line

TIMEOUT = 10
"""Seconds to wait for the hub's answer."""

logger = log.get(__name__)


def options(path: str) -> dict[str, Any]:
    """Return the arguments to pass to every `from_pretrained` of a directory or hub name."""
    # Without `local_files_only`, transformers retries every file of an unreachable hub for half a minute.
    return {} if Path(path).is_dir() or unreachable() is None else {"local_files_only": True}


def why_not_read(path: str, error: BaseException) -> str:
    """Explain a library's error about `path`, with the remedy if the hub is unreachable."""
    if Path(path).is_dir() or unreachable() is None:
        return first_line(error)
    return (
        f"the hub cannot be reached, {unreachable()}, and its cache here lacks it; download it where it can be "
        f"(`hf download {path}`), or give a directory"
    )


@cache
def unreachable() -> str | None:
    """Return the reason why the hub is unreachable, or None if it can be reached. Cached."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        # Through the library's own session, which knows proxies and certificates.
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # from requests or httpx, depending on the version of huggingface_hub
        reason = first_line(error)
        logger.warning("%s cannot be reached (%s): only its cache on this machine is read", constants.ENDPOINT, reason)
        return reason
    return None
