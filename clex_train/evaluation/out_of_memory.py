"""What memory does not hold is recognised, given back, agreed on by all ranks and said once; the rest goes on.

room = Room(model, "method ntk, protocol one_shot, 65536 tokens")
for piece in pieces:
    found = room.attempt(lambda: forward(piece))      None where memory ran out
reason = room.lacking()                               the same on every rank
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


class Room:
    """Whether this rank's memory holds every piece of one cell of the table; after one that it does not, none is tried.

    A rank that leaves out its pieces takes part in the same collectives as the others, which go on.
    """

    def __init__(self, model: nn.Module, cell: str) -> None:
        self.cell, self._reason = cell, ""
        _unpin()
        self._needs_others = distributed.world_size() > 1 and is_sharded(model)

    def attempt(self, work: Callable[[], Tensor]) -> Tensor | None:
        """What `work` returns; None if memory runs out meanwhile, or did before.

        Raises `RunStopped` if it runs out while several ranks share the weights: the others wait for this one's.
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
                    f"out of memory: {self.cell} ({self._reason}); ranks that share the weights cannot go on without "
                    f"this one; leave the length out, or: {REMEDIES}"
                ) from error
        # Not inside `except`, where the traceback still holds what the forward had made.
        give_back()
        return None

    def holds_so_far(self) -> bool:
        """Tell whether no rank has lacked memory yet. Collective."""
        return not distributed.any_rank(bool(self._reason))

    def lacking(self) -> str:
        """Why the first rank that lacked memory did, logged by rank 0; empty where all had enough. Collective."""
        if not distributed.any_rank(bool(self._reason)):
            return ""
        reason = next(filter(None, distributed.gather_objects(self._reason)))
        if distributed.is_main():
            logger.warning("out of memory: %s is left out (%s); %s", self.cell, reason, REMEDIES)
        return reason


def is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold shares of the weights (ZeRO-3), so that each forward is a collective."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def return_what_is_freed() -> None:
    """On a CPU, from now on: the memory of a large tensor goes back to the system when it is freed, where libc can.

    By glibc's defaults the heap soon serves tensors of up to 32 MiB, and what lives on between them (a cache that
    grows) keeps the pages of those that are gone: at 64k a fifth of what an evaluation needs.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if hasattr(LIBC, "mallopt") and distributed.device().type == "cpu":
        LIBC.mallopt(mmap_threshold, 256 * 1024)


def give_back() -> None:
    """Return memory that nothing refers to any more: on a GPU to the driver, on a CPU to the system where libc can."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        _unpin()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def _unpin() -> None:
    """Return pinned host memory that is free: a cache of another length takes blocks of another size."""
    if torch.cuda.is_available():
        torch._C._host_emptyCache()
