"""flex_attention masks built per tile equal those that torch computes key by key."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from clex_train.attention import block_mask
from clex_train.attention.block_mask import band_mask, padded_band_mask
from tests.helpers.largest_tensor import LargestTensor

# queries, keys, offset of the first query among the keys, L
CASES = [
    (300, 300, 0, 70),
    (300, 300, 0, 500),
    (512, 767, 255, 256),
    (130, 529, 399, 400),
    (1024, 1151, 127, 128),
    (700, 1000, 300, 301),
    (64, 64, 0, 1),
]
CPU = torch.device("cpu")


def tiles(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Return the masks of tiles with visible entries and of fully visible tiles, [B, 1, Q, K]."""

    def dense(count: Tensor, index: Tensor) -> Tensor:
        listed = torch.arange(index.shape[-1]) < count[..., None]
        return torch.zeros(index.shape, dtype=torch.int64).scatter_add_(-1, index.long(), listed.long()).bool()

    partly, wholly = dense(mask.kv_num_blocks, mask.kv_indices), dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partly & wholly).any()
    return partly | wholly, wholly


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_tiles_equal_those_that_torch_finds_key_by_key(case, padded):
    num_queries, num_keys, offset, n_local = case
    first_key, padding = 1000, torch.tensor([0, 1000 + num_keys // 3, 1000 + 127, 1000 + 128])
    if padded:
        ours = padded_band_mask(num_queries, num_keys, offset, n_local, first_key, padding)
    else:
        ours = band_mask(num_queries, num_keys, offset, n_local, CPU)

    def is_visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = offset + query - key
        window = (distance >= 0) & (distance < n_local)
        return window & (first_key + key >= padding[batch]) if padded else window

    expected = create_block_mask(
        is_visible, len(padding) if padded else None, None, num_queries, num_keys, device="cpu"
    )
    assert ours.shape == expected.shape
    (some, whole), (expected_some, expected_whole) = tiles(ours), tiles(expected)
    assert torch.equal(whole, expected_whole)
    # A tile can have keys in the band and unpadded keys but none that is both: it is then visited for nothing.
    assert (some | ~expected_some).all()
    assert int((some & ~expected_some).sum()) <= (len(padding) * num_queries // 128 if padded else 0)


def test_a_long_window_is_not_evaluated_key_by_key():
    """Bound the memory: key by key, 2 L queries with a window of 32k tokens take a boolean mask of 6.4 GiB."""
    with LargestTensor() as largest:
        padded_band_mask(65536, 98303, 32767, 32768, 0, torch.tensor([5]))
    assert largest.elements <= 2 * (65536 // 128) * (98304 // 128)


def test_a_cached_mask_can_be_used_in_training():
    block_mask.band_mask.cache_clear()
    with torch.inference_mode():
        mask = band_mask(256, 256, 0, 64, CPU)
    assert not mask.kv_indices.is_inference()
    assert not mask.q_indices.is_inference()
