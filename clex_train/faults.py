"""What ends a run before its last step, each with its own exit code; and how a full memory is recognised."""

ALLOCATOR_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""By which errors of allocators that are plain `RuntimeError`s are known."""


class RunStopped(RuntimeError):
    """Training was stopped to protect what it has: the message says why, what is safe, and what to do."""


class StopRequested(RuntimeError):
    """The run was asked to stop and has saved what it had: the same command goes on. Every rank raises it."""


class RankLost(RuntimeError):
    """A rank died, froze or hangs, so that the others cannot go on: the message says which and what it was doing."""

    exit_code = 4


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
