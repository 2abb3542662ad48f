"""Documents of a packed row that do not see each other, by what transformers has for it.

Without a padding mask and a cache, its masks of eager, sdpa and flex attention read `position_ids` that restart as the
borders of documents. Flash attention reads them for batches of one row only, and waits for the GPU in every layer to
do so; it is given the borders as `cu_seq_lens` instead, of whole rows too. Shapes: `B` rows, `S` tokens of a row,
`E` borders.
"""

from typing import Any

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from clex_train.config.attention import AttentionImplementation
from clex_train.utils import distributed


def document_mask_kwargs(
    position_ids: Int64[Tensor, "B S"], implementation: AttentionImplementation, device: torch.device
) -> dict[str, Any]:
    """What to call a causal LM with (and `use_cache=False`), so that documents are apart.

    `position_ids`, on the CPU, count from 0 in each document and begin every row with 0.
    """
    arguments: dict[str, Any] = {"position_ids": distributed.to_device(position_ids, device)}
    if implementation is AttentionImplementation.flash_attention_2:
        arguments |= _lengths_for_flash(cumulative_lengths(position_ids), device)
    return arguments


def single_document_kwargs(
    input_ids: Int64[Tensor, "B S"], implementation: AttentionImplementation, device: torch.device
) -> dict[str, Any]:
    """What to call a causal LM with for rows that are one document each, so that no layer waits to find that out."""
    if implementation is not AttentionImplementation.flash_attention_2 or len(input_ids) > 1:
        return {}
    return _lengths_for_flash(torch.tensor([0, input_ids.shape[1]], dtype=torch.int32), device)


def _lengths_for_flash(borders: Int32[Tensor, " E"], device: torch.device) -> dict[str, Any]:
    longest, on_device = int(borders.diff().max()), distributed.to_device(borders, device)
    return {"cu_seq_lens_q": on_device, "cu_seq_lens_k": on_device, "max_length_q": longest, "max_length_k": longest}


def cumulative_lengths(position_ids: Int64[Tensor, "B S"]) -> Int32[Tensor, " E"]:
    """Where each document begins when the rows are laid end to end, and after the last one the number of tokens."""
    flat = position_ids.flatten()
    starts = flat.eq(0).nonzero().flatten()
    return torch.cat((starts, torch.tensor([len(flat)], device=flat.device))).to(torch.int32)
