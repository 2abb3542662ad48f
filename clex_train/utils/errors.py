"""Errors that end a program, checks that raise `ConfigError`, and tests for a full memory or disk."""

import errno
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

ALLOCATOR_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Phrases that identify allocation failures raised as plain `RuntimeError`."""

MOST_ITEMS = 1000
"""Length of a list of numbers in a configuration."""
LONGEST_SHOWN = 80
"""Characters of a refused name that a message shows."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OS_ERROR_OF_RUST = re.compile(r"\(os error (\d+)\)$")
"""Suffix with which Rust libraries (safetensors, tokenizers) report an error of the operating system."""


class InputError(ValueError):
    """The user's input is unusable: programs print the message as one line and exit with code 2.

    Any other `ValueError` is a bug: it keeps its traceback, and the exit code is 1.
    """


class ConfigError(InputError):
    """A configuration key, argument or file is refused.

    Args:
        key: configuration key, argument or file at fault.
        value: refused value; None for a file, or a key that has none.
        remedy: reason and remedy.
    """

    def __init__(self, key: object, value: object, remedy: str) -> None:
        # Exceptions unpickle by calling the class with `args`, so pass all three for errors of worker processes.
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = str(key), value, remedy

    def __str__(self) -> str:
        return f"{self.key}: {self.remedy}" if self.value is None else f"{self.key}={self.value}: {self.remedy}"


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise `ConfigError` unless `condition`, on a value that the user set, is true."""
    if not condition:
        raise ConfigError(key, value, remedy)


def shortened(text: str) -> str:
    """Return a text that fits one line: quoted if empty or with unprintable characters, and truncated."""
    shown = text if text.strip() == text != "" and text.isprintable() else repr(text)
    return shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}..."


def require_at_most(settings: object, prefix: str, most: Mapping[str, float]) -> None:
    """Raise `ConfigError` for numbers that are not finite, or larger than any machine can serve.

    `most` maps fields of `settings` to upper bounds. Lists are checked item by item, and for their length.
    """
    for name, bound in most.items():
        value = getattr(settings, name)
        items = value if isinstance(value, list) else [value]
        key = f"{prefix}{name}"
        require(len(items) <= MOST_ITEMS, key, f"[{len(items)} numbers]", f"at most {MOST_ITEMS}")
        for item in items:
            # -inf is below every bound; an int is finite, and may be too large for math.isfinite.
            is_finite = not isinstance(item, float) or math.isfinite(item)
            require(item is None or (is_finite and item <= bound), key, value, f"a finite number, at most {bound:,}")


class RunStopped(RuntimeError):
    """Training was stopped to protect its state; the message gives the reason, what is safe, and the remedy."""


class StopRequested(RuntimeError):
    """The run saved its state on request and stopped; the same command resumes it. Raised on every rank."""


class RankLost(RuntimeError):
    """A rank died, froze or hangs, so the others cannot continue; the message names it and its last operation."""

    exit_code = 4


@contextmanager
def renamed_key(key: str, new: str) -> Iterator[None]:
    """Report a refused `key` as `new` inside the block, for programs that set the value by another key."""
    try:
        yield
    except ConfigError as error:
        if error.key != key:
            raise
        raise ConfigError(new, error.value, error.remedy) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, joined with the next if it ends in a colon."""
    # A `KeyError` shows only the key, and some errors have no message, so add the type.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return ": ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error, or a cause of it, is a failed allocation on GPU or host."""
    # Imported here, so that programs which only print their help start without torch.
    from torch import OutOfMemoryError

    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR_WORDS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def disk_error(error: BaseException) -> OSError | None:
    """Return the `OSError` that an error is or was caused by, inside Rust libraries too; None for any other error."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        if isinstance(link, OSError):
            return link
        if isinstance(link, Exception) and (found := OS_ERROR_OF_RUST.search(str(link))):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        seen.append(link)
        link = link.__cause__ or link.__context__
    return None


def no_room(error: BaseException) -> OSError | None:
    """Return the `OSError` of a full disk or exhausted quota that an error is or was caused by, else None."""
    found = disk_error(error)
    return found if found is not None and found.errno in NO_ROOM else None
