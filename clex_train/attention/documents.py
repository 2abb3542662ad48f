"""Documents of a packed row that do not see each other, by what transformers has for it.

Without a padding mask and a cache, its masks of eager, sdpa and flex attention read `position_ids` that restart as the
borders of documents. Flash attention reads them for batches of one row only, and waits for the GPU in every layer to
do so; it is given the borders as `cu_seq_lens` instead. Shapes: `B` rows, `S` tokens of a row, `E` borders.
"""

from typing import Any

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from clex_train.settings.attention import AttentionImplementation


def separating_arguments(
    position_ids: Int64[Tensor, "B S"], implementation: AttentionImplementation, device: torch.device
) -> dict[str, Any]:
    """What to call a causal LM with (and `use_cache=False`), so that documents are apart.

    `position_ids`, on the CPU, count from 0 in each document and begin every row with 0.
    """
    arguments: dict[str, Any] = {"position_ids": position_ids.to(device)}
    if implementation is AttentionImplementation.flash_attention_2:
        borders = cumulative_lengths(position_ids)
        longest = int(borders.diff().max())
        on_device = borders.to(device)
        arguments |= {"cu_seq_lens_q": on_device, "cu_seq_lens_k": on_device}
        arguments |= {"max_length_q": longest, "max_length_k": longest}
    return arguments


def cumulative_lengths(position_ids: Int64[Tensor, "B S"]) -> Int32[Tensor, " E"]:
    """Where each document begins when the rows are laid end to end, and after the last one the number of tokens."""
    flat = position_ids.flatten()
    starts = flat.eq(0).nonzero().flatten()
    return torch.cat((starts, torch.tensor([len(flat)], device=flat.device))).to(torch.int32)
