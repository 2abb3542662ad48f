"""Memory of Ulysses' all-to-all without its communication: its allocations, on the meta device.

Follows DeepSpeed's `UlyssesSPAttentionHF` around the attention statement by statement, so that copies live as long as
they do there. Shapes: `B` rows, `H` heads, `K` key heads, `N` ranks, `n` tokens of a part, `D` head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from clex_train.preflight.activations import attention_by_sizes


class _SizesOfAllToAll(torch.autograd.Function):
    """All-to-all by sizes: the received tensor is as large as the sent one."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor) -> Tensor:
        return torch.empty_like(sent.contiguous())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return torch.empty_like(grad_outputs[0].contiguous())


def exchanged_by_sizes(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, ranks: int, **__: Any
) -> tuple[Tensor, None]:
    """Apply `attention_by_sizes` to whole rows, of which each of `ranks` ranks has a part; returns [B, n, H, D]."""
    rows, heads, tokens, width = query.shape
    whole = [_whole_rows(part, ranks) for part in (query, key, value)]
    for index, tensor in enumerate(whole):
        whole[index] = tensor.permute(1, 2, 0, 3).contiguous()
    output = attention_by_sizes(module, *whole)[0]
    sent = output.transpose(0, 1).reshape(ranks, tokens, rows, -1).contiguous()
    received = _SizesOfAllToAll.apply(sent).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
    made = received.reshape(tokens, rows, -1).contiguous().transpose(0, 1)
    return made.reshape(rows, tokens, heads, width), None


def _whole_rows(part: Tensor, ranks: int) -> Tensor:
    """Convert [B, H, n, D] to [N * n, B, H / N, D]; key heads fewer than ranks are repeated."""
    part = part.permute(2, 0, 1, 3)
    tokens, rows, heads, width = part.shape
    if heads < ranks:
        part = part.repeat_interleave(ranks // heads, dim=2)
    dealt = part.reshape(tokens, rows, ranks, -1, width).permute(2, 0, 1, 3, 4).contiguous()
    received: Tensor = _SizesOfAllToAll.apply(dealt)  # type: ignore[no-untyped-call]  # torch leaves Function.apply untyped
    return received.reshape(ranks * tokens, rows, -1, width).contiguous()
