"""Ulysses attention: each rank holds part of the tokens of a row and attends with all tokens of a share of the heads.

The function is registered in transformers' attention interface under its own name. The configs of one model carry that
name only inside `UlyssesAttention.active`, so every other model keeps its attention. No mask is made: documents are
separated by their borders, which every rank knows for the whole row (DeepSpeed-Ulysses, arXiv 2309.14509).
Shapes: `B` rows, `H` heads, `N` ranks, `n` tokens of a rank, `S` = N * n tokens of a row, `D` head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clex_train.attention.document_mask import cumulative_lengths, document_mask_kwargs
from clex_train.attention.select import ULYSSES
from clex_train.config.attention import AttentionImplementation

ATTRIBUTE = "ulysses_attention"
GROUPS = "num_key_value_groups"

Attention = Callable[..., tuple[Tensor, Any]]
"""(module, query, key, value, mask, **options) -> output [B, S, H, D], as transformers' attention functions."""


class UlyssesAttention:
    """Ulysses attention of one model.

    `wrap_all_to_all(attention)` returns the function around `attention`: it takes this rank's queries, keys and values
    [B, H, n, D], calls `attention` with [B, H / N, S, D] and returns [B, n, H * D].
    """

    def __init__(self, model: nn.Module, wrap_all_to_all: Callable[[Attention], Attention]) -> None:
        self._all_to_all = wrap_all_to_all(self._attend)
        configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
        self._configs: list[Any] = list(configs.values())
        self._implementations: dict[int, str] = {}
        self._position_ids: Tensor | None = None
        self._lengths: dict[str, Any] = {}
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                # The interface passes the function the module alone, so the module must refer to this object.
                setattr(module, ATTRIBUTE, self)

    @contextmanager
    def active(self, position_ids: Int64[Tensor, "B S"] | None = None) -> Iterator[None]:
        """Use Ulysses attention while the context is open.

        Keep it open through the backward pass, which may recompute the forward. `position_ids` of the whole rows, on
        the CPU, count from 0 in each document; None for rows of one document.
        """
        self._implementations = {id(config): config._attn_implementation for config in self._configs}
        self._position_ids, self._lengths = position_ids, {}
        _set_implementation(self._configs, ULYSSES)
        try:
            yield
        finally:
            for config in self._configs:
                config._attn_implementation = self._implementations[id(config)]
            self._position_ids, self._lengths = None, {}

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Float[Tensor, "B n H D"]:
        """Compute the attention output for this rank's tokens."""
        had_groups, groups = hasattr(module, GROUPS), getattr(module, GROUPS, None)
        # DeepSpeed all-gathers `position_ids` in every layer; one number keeps that cheap, and the values go unused.
        unused = torch.zeros(1, 1, dtype=torch.int64, device=query.device)
        try:
            output, _ = self._all_to_all(module, query, key, value, None, position_ids=unused, **options)
        finally:
            # With fewer key heads than ranks, DeepSpeed overwrites the module's group count and leaves it wrong.
            if had_groups:
                setattr(module, GROUPS, groups)
            elif hasattr(module, GROUPS):
                delattr(module, GROUPS)
        by_heads: Tensor = output.unflatten(-1, (query.shape[1], -1))
        return by_heads

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, position_ids: Tensor, **options: Any
    ) -> tuple[Tensor, None]:
        """Call the model's own attention function on whole rows [B, H / N, S, D]."""
        name = self._implementations[id(module.config)]
        # transformers' flash attention picks its variant by this name, so it must be the original during the call.
        module.config._attn_implementation = name
        try:
            function = ALL_ATTENTION_FUNCTIONS[name]
            if self._position_ids is None:
                return function(module, query, key, value, None, **options)[0], None
            return DOCUMENT_ATTENTION[name](self, function, module, query, key, value, **options), None
        finally:
            module.config._attn_implementation = ULYSSES

    def _attend_per_document(
        self, function: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Float[Tensor, "B S H D"]:
        """Attend within each document by a call of its own."""
        rows = []
        for row, borders in enumerate(self._document_borders()):
            # A document mask would have S * S entries and cost the compute of a single long document.
            spans = [(slice(row, row + 1), slice(None), slice(*span)) for span in pairwise(borders)]
            parts = [function(module, query[s], key[s], value[s], None, **options)[0] for s in spans]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def _attend_varlen(
        self, function: Attention, module: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Float[Tensor, "B S H D"]:
        """Attend within each document by one flash-attn call with cumulative lengths."""
        if not self._lengths:
            assert self._position_ids is not None
            flash = AttentionImplementation.flash_attention_2
            # Computed once per micro-batch: every layer uses the same lengths.
            self._lengths = document_mask_kwargs(self._position_ids, flash, query.device)
            del self._lengths["position_ids"]
        return function(module, query, key, value, None, **{**options, **self._lengths})[0]

    def _document_borders(self) -> list[list[int]]:
        """Return the document starts of each row, followed by the row's length."""
        assert self._position_ids is not None
        return [cumulative_lengths(row[None]).tolist() for row in self._position_ids]


DOCUMENT_ATTENTION: dict[str, Callable[..., Tensor]] = {
    "sdpa": UlyssesAttention._attend_per_document,
    "flash_attention_2": UlyssesAttention._attend_varlen,
}
"""Document masking by the model's own attention implementation."""


def ulysses_attention(
    module: nn.Module,
    query: Float[Tensor, "B H n D"],
    key: Float[Tensor, "B K n D"],
    value: Float[Tensor, "B K n D"],
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "B n H D"], None]:
    """Attend by transformers' attention interface.

    There is no mask, and `position_ids` that some families pass on are ignored.
    """
    rows: UlyssesAttention | None = getattr(module, ATTRIBUTE, None)
    assert rows is not None, f"attn_implementation={ULYSSES} works only inside UlyssesAttention.active"
    assert attention_mask is None, "no mask function has this name, so transformers builds none"
    return rows.attention(module, query, key, value, **options), None


def _set_implementation(configs: list[Any], name: str) -> None:
    for config in configs:
        config._attn_implementation = name


AttentionInterface.register(ULYSSES, ulysses_attention)
