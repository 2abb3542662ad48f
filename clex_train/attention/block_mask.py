"""flex_attention block masks for a sliding window, computed per tile of 128 queries by 128 keys.

torch's `create_block_mask` evaluates the mask for every query and key: tens of GiB for one block with a window of 32k
tokens. Distances within a tile form a range, so its two ends decide whether the band covers all, some or none of it.
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
    """Build the mask of keys at 0 <= offset + query - key < L.

    It is cached: all blocks of a call but the first and last ones share it.
    """
    # A tensor, not a number: dynamo would compile the number in, and recompile for each length of the last block.
    first = torch.tensor(offset, device=device)
    some, whole = _tiles(num_queries, num_keys, offset, n_local, device)
    return BlockMask.from_kv_blocks(
        *_to_kv_blocks(some & ~whole),
        *_to_kv_blocks(whole),
        BLOCK_SIZE=TILE,
        # A lambda: flex_attention inspects the signature of the bare function, which jaxtyping's checker would hide.
        mask_mod=lambda batch, head, query, key: (first + query - key >= 0) & (first + query - key < n_local),
        seq_lengths=(num_queries, num_keys),
    )


def padded_band_mask(
    num_queries: int, num_keys: int, offset: int, n_local: int, first_key: int, padding: Int[Tensor, " B"]
) -> BlockMask:
    """Build `band_mask` without padding.

    `first_key` is the first key's index in the stream, `padding` [B] that of each row's first valid token.
    """
    device = padding.device
    first, rank = (torch.tensor(number, device=device) for number in (offset, first_key))
    some, whole = _tiles(num_queries, num_keys, offset, n_local, device)
    first_of_tile, last_of_tile = (first_key + bound for bound in _bounds(num_keys, device))
    # A tile is whole only if its first key is past the padding, and partial if at least its last one is.
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
    """Return which tiles contain some of the band, and which lie in it entirely."""
    (first_query, last_query), (first_key, last_key) = (_bounds(number, device) for number in (num_queries, num_keys))
    nearest = offset + first_query[:, None] - last_key
    farthest = offset + last_query[:, None] - first_key
    # A cut tile at the end counts as partial: the mask must still hide the missing rows and columns.
    complete = (last_query - first_query == TILE - 1)[:, None] & (last_key - first_key == TILE - 1)
    some = (farthest >= 0) & (nearest < n_local)
    whole = (nearest >= 0) & (farthest < n_local) & complete
    return some[None, None], whole[None, None]


def _bounds(number: int, device: torch.device) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
    """Return the first and last index of each tile."""
    first = torch.arange(0, number, TILE, device=device)
    return first, (first + TILE - 1).clamp(max=number - 1)


def _to_kv_blocks(tiles: Bool[Tensor, "B 1 Q K"]) -> tuple[Int[Tensor, "B 1 Q"], Int[Tensor, "B 1 Q K"]]:
    """Convert to BlockMask's format: the number of key tiles per query tile, and their indices first."""
    # A stable sort keeps the tiles in order of memory.
    return tiles.sum(dim=-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()
