"""Out-of-memory handling in one table cell: free memory, agree across ranks, log once, continue with the next.

guard = MemoryGuard(model, "method ntk, protocol one_shot, 65536 tokens")
for piece in pieces:
    found = guard.attempt(lambda: forward(piece))      None where memory ran out
reason = guard.shortage()                               the same on every rank
"""

import ctypes
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from clex_train.utils import distributed, log
from clex_train.utils.errors import RunStopped, first_line, is_out_of_memory

logger = log.get(__name__)

LIBC = ctypes.CDLL(None)

REMEDIES = (
    "less memory is needed with a smaller chunk_len or batch_tokens, with offload_cache=true, "
    "or with sharded=true on more ranks"
)


class MemoryGuard:
    """Runs the pieces of one table cell until this rank is out of memory, and skips the rest.

    A rank that skips its pieces still takes part in the collectives of the others.
    """

    def __init__(self, model: nn.Module, cell: str) -> None:
        self.cell, self._reason = cell, ""
        # Cached pinned blocks of the last cell have another size and would never be reused.
        _unpin()
        # With sharded weights every forward is a collective, so no rank may skip one.
        self._needs_others = distributed.world_size() > 1 and is_sharded(model)

    def attempt(self, work: Callable[[], Tensor]) -> Tensor | None:
        """Run `work` and return its result, or None if this rank is out of memory, now or earlier in the cell.

        Raises `RunStopped` when several ranks share the weights, because the others wait for this rank's forward.
        """
        if self._reason:
            return None
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = f"rank {distributed.rank()}: {first_line(error)}"
            if self._needs_others:
                raise RunStopped(
                    f"out of memory: {self.cell} ({self._reason}); ranks with sharded weights cannot continue without "
                    f"this one; leave the length out, or: {REMEDIES}"
                ) from error
        # Not inside `except`: the traceback still refers to the forward's tensors there.
        free_memory()
        return None

    def fits_so_far(self) -> bool:
        """Return True if no rank has run out of memory so far. Collective."""
        return not distributed.any_rank(bool(self._reason))

    def shortage(self) -> str:
        """Return the first rank's reason for running out of memory, or an empty string. Rank 0 logs it. Collective."""
        if not distributed.any_rank(bool(self._reason)):
            return ""
        reason = next(filter(None, distributed.gather_objects(self._reason)))
        if distributed.is_main():
            logger.warning("out of memory: skipping %s (%s); %s", self.cell, reason, REMEDIES)
        return reason


def is_sharded(model: nn.Module) -> bool:
    """Return True if the weights are sharded (ZeRO-3), so that each forward is a collective."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def release_freed_memory() -> None:
    """Make glibc return the memory of large freed CPU tensors to the system at once, from now on."""
    # By default glibc raises its mmap threshold up to 32 MiB as blocks are freed. A growing cache between freed tensors
    # then pins their heap pages: at 64k tokens a fifth of what an evaluation needs. Setting the threshold fixes it.
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if hasattr(LIBC, "mallopt") and distributed.device().type == "cpu":
        LIBC.mallopt(mmap_threshold, 256 * 1024)


def free_memory() -> None:
    """Return unused memory: on a GPU to the driver, on a CPU to the system where libc supports it."""
    # First break reference cycles, through which dead tensors may still be reachable.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        _unpin()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _unpin() -> None:
    """Return unused pinned host memory to the system."""
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
