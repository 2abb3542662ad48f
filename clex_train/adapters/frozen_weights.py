"""Digest of the frozen weights, the same on any number of ranks and under every ZeRO stage.

Checkpoints hold the trained parameters alone. Frozen weights are read from `model.path` at every launch, so a resumed
run has to find the same ones there.

    sum over i of (1 + i mod 65521) bits_i, mod 2^64,    bits_i: the bits of element i of a parameter, as an integer
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from clex_train.utils import distributed

MODULUS, WORD = 65521, 2**64
CHUNK = 2**22
"""Elements that are summed at once; their int64 copies take 100 MB."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(model: nn.Module) -> str:
    """Return the hexadecimal SHA-256 of the sums and names of all parameters that are not trained. Collective."""
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    own = [_own_sum(parameter) for _, parameter in frozen]
    is_sharded = any(hasattr(parameter, "ds_tensor") for _, parameter in frozen)
    # Sums of parts add up to the sum of the whole, in whatever parts the ranks hold a parameter.
    sums = [sum(parts) % WORD for parts in zip(*distributed.gather_objects(own), strict=True)] if is_sharded else own
    facts = [f"{name} {total}" for (name, _), total in zip(frozen, sums, strict=True)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _own_sum(parameter: Tensor) -> int:
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return _sum(parameter.detach().flatten(), 0)
    first = distributed.rank() * shard.numel()
    # The last shard is padded with whatever was in memory.
    size = max(0, min(shard.numel(), parameter.ds_numel - first))  # type: ignore[attr-defined]  # DeepSpeed sets it
    return _sum(shard.detach().flatten()[:size], first)


def _sum(flat: Tensor, first: int) -> int:
    """Compute the sum of a flat part that begins at element `first`."""
    return sum(_sums_of_chunks(flat, first)) % WORD


def _sums_of_chunks(flat: Tensor, first: int) -> Iterator[int]:
    bits = flat.contiguous().view(INTEGERS[flat.element_size()])
    for start in range(0, len(bits), CHUNK):
        chunk = bits[start : start + CHUNK].long()
        places = torch.arange(first + start, first + start + len(chunk), device=chunk.device)
        # int64 sums wrap around, which is the modulus that is wanted.
        yield int((chunk * (1 + places % MODULUS)).sum())
