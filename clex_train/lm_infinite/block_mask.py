"""flex_attention's masks of a window's band, from the bounds of its tiles of 128 queries and 128 keys.

`create_block_mask` of torch works the mask out for every query and key: with a window of 32k tokens that is tens of
GiB for one block. Distances within a tile are a range, so its ends say whether the band has all, some or none of it.
Shapes: `B` batch, `Q` tiles of queries, `K` tiles of keys.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

TILE = 128


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def band_mask(num_queries: int, num_keys: int, offset: int, n_local: int, device: torch.device) -> BlockMask:
    """Keys at 0 <= offset + query - key < L: the same for all blocks but the first and the last ones of a call.

    Kept, and so made outside of inference mode, whose tensors take part in no training.

    Masks are lambdas because flex_attention counts the arguments of the bare function, which a checker of types would
    hide. Where a block lies is a tensor in them: a number would be compiled in, and every length of the last block
    compile anew.
    """
    first = torch.tensor(offset, device=device)
    some, whole = _tiles(num_queries, num_keys, offset, n_local, device)
    return BlockMask.from_kv_blocks(
        *_to_kv_blocks(some & ~whole),
        *_to_kv_blocks(whole),
        BLOCK_SIZE=TILE,
        mask_mod=lambda batch, head, query, key: (first + query - key >= 0) & (first + query - key < n_local),
        seq_lengths=(num_queries, num_keys),
    )


def padded_band_mask(
    num_queries: int, num_keys: int, offset: int, n_local: int, first_key: int, padding: Int[Tensor, " B"]
) -> BlockMask:
    """The same without the keys before `padding`, counted in the stream, where the first key is `first_key`."""
    device = padding.device
    first, rank = (torch.tensor(number, device=device) for number in (offset, first_key))
    some, whole = _tiles(num_queries, num_keys, offset, n_local, device)
    first_of_tile, last_of_tile = (first_key + bound for bound in _bounds(num_keys, device))
    some = some & (last_of_tile >= padding[:, None])[:, None, None]
    whole = whole & (first_of_tile >= padding[:, None])[:, None, None]
    return BlockMask.from_kv_blocks(
        *_to_kv_blocks(some & ~whole),
        *_to_kv_blocks(whole),
        BLOCK_SIZE=TILE,
        mask_mod=lambda batch, head, query, key: (
            (first + query - key >= 0) & (first + query - key < n_local) & (rank + key >= padding[batch])
        ),
        seq_lengths=(num_queries, num_keys),
    )


def _tiles(
    num_queries: int, num_keys: int, offset: int, n_local: int, device: torch.device
) -> tuple[Bool[Tensor, "1 1 Q K"], Bool[Tensor, "1 1 Q K"]]:
    """Where a tile has some of the band, and where it is whole tiles that have nothing else."""
    (first_query, last_query), (first_key, last_key) = (_bounds(number, device) for number in (num_queries, num_keys))
    nearest = offset + first_query[:, None] - last_key
    farthest = offset + last_query[:, None] - first_key
    complete = (last_query - first_query == TILE - 1)[:, None] & (last_key - first_key == TILE - 1)
    some = (farthest >= 0) & (nearest < n_local)
    whole = (nearest >= 0) & (farthest < n_local) & complete
    return some[None, None], whole[None, None]


def _bounds(number: int, device: torch.device) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """First and last index of each tile."""
    first = torch.arange(0, number, TILE, device=device)
    return first, (first + TILE - 1).clamp(max=number - 1)


def _to_kv_blocks(tiles: Bool[Tensor, "B 1 Q K"]) -> tuple[Int[Tensor, "B 1 Q"], Int[Tensor, "B 1 Q K"]]:
    """How many tiles of keys each tile of queries has, and which, these first."""
    return tiles.sum(dim=-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()
