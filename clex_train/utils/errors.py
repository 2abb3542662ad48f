"""Errors that end a program, each with its own exit code, and tests for a full memory or disk."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

ALLOCATOR_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""By which errors of allocators that are plain `RuntimeError`s are known."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OS_ERROR_OF_RUST = re.compile(r"\(os error (\d+)\)$")
"""How the libraries in Rust (safetensors, tokenizers) end the message of an error of the operating system."""


class InputError(ValueError):
    """The user's input cannot be used: programs print the message as one line and exit with code 2.

    Any other `ValueError` is a bug: it keeps its traceback, and the exit code is 1.
    """


class ConfigError(InputError):
    """A key, argument or file of the user's is refused.

    Args:
        key: the configuration key, argument or file at fault.
        value: the refused value; None for a key without one, or for a file.
        remedy: why it is refused, and what to do about it.
    """

    def __init__(self, key: object, value: object, remedy: str) -> None:
        # The arguments as they are, so that worker processes can pickle the error.
        super().__init__(key, value, remedy)
        self.key, self.value, self.remedy = str(key), value, remedy

    def __str__(self) -> str:
        return f"{self.key}: {self.remedy}" if self.value is None else f"{self.key}={self.value}: {self.remedy}"


class RunStopped(RuntimeError):
    """Training was stopped to protect what it has: the message says why, what is safe, and what to do."""


class StopRequested(RuntimeError):
    """The run was asked to stop and has saved what it had: the same command goes on. Every rank raises it."""


class RankLost(RuntimeError):
    """A rank died, froze or hangs, so that the others cannot go on: the message says which and what it was doing."""

    exit_code = 4


@contextmanager
def renamed_key(key: str, new: str) -> Iterator[None]:
    """Name a refused `key` as `new` inside, where the program's user sets the value by another key."""
    try:
        yield
    except ConfigError as error:
        if error.key != key:
            raise
        raise ConfigError(new, error.value, error.remedy) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the next where it ends in a colon.

    A `KeyError` says no more than a key, and some errors nothing: those have their type named.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return ": ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it arose from, says that the GPU's or the host's memory is used up."""
    # Programs that only print their help do without torch.
    from torch import OutOfMemoryError

    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR_WORDS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def disk_error(error: BaseException) -> OSError | None:
    """Return the `OSError` that an error is or arose from, also within a library in Rust; None for any other error."""
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
    """Return the `OSError` of a full disk or a used-up quota that an error is or arose from."""
    found = disk_error(error)
    return found if found is not None and found.errno in NO_ROOM else None
