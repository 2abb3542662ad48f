"""Document masking for packed rows: keyword arguments that keep documents apart in a Hugging Face causal LM.

Without a padding mask and a cache, transformers' masks for eager, SDPA and flex attention read `position_ids` that
restart as document borders. Flash attention reads them for batches of one row only, and synchronizes with the GPU in
every layer to do so. It is given `cu_seq_lens` instead.
Shapes: `B` rows, `S` tokens of a row, `E` borders.
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
    """Build keyword arguments for a causal LM (called with `use_cache=False`) that mask other documents.

    `position_ids`, on the CPU, count from 0 in each document and begin every row with 0.
    """
    arguments: dict[str, Any] = {"position_ids": distributed.to_device(position_ids, device)}
    if implementation is AttentionImplementation.flash_attention_2:
        arguments |= _lengths_for_flash(cumulative_lengths(position_ids), device)
    return arguments


def single_document_kwargs(
    input_ids: Int64[Tensor, "B S"], implementation: AttentionImplementation, device: torch.device
) -> dict[str, Any]:
    """Build keyword arguments for rows that hold one document each."""
    # Batches of one row only: there transformers looks for restarting positions, synchronizing in every layer.
    if implementation is not AttentionImplementation.flash_attention_2 or len(input_ids) > 1:
        return {}
    return _lengths_for_flash(torch.tensor([0, input_ids.shape[1]], dtype=torch.int32), device)


def _lengths_for_flash(borders: Int32[Tensor, " E"], device: torch.device) -> dict[str, Any]:
    # `position_ids` are on the CPU, so `int` here does not synchronize; the kernel wants a Python int.
    longest, on_device = int(borders.diff().max()), distributed.to_device(borders, device)
    return {"cu_seq_lens_q": on_device, "cu_seq_lens_k": on_device, "max_length_q": longest, "max_length_k": longest}


def cumulative_lengths(position_ids: Int64[Tensor, "B S"]) -> Int32[Tensor, " E"]:
    """Return the start of each document in the flattened rows, followed by the total number of tokens."""
    flat = position_ids.flatten()
    starts = flat.eq(0).nonzero().flatten()
    # flash-attn requires int32 offsets.
    return torch.cat((starts, torch.tensor([len(flat)], device=flat.device))).to(torch.int32)
