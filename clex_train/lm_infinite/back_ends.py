"""Back ends of the local part: blocked SDPA (everywhere), flex_attention and windowed flash-attn (GPU).

Each computes attention of rotated queries to the rotated keys of their windows, with its log-sum-exp, one block of
queries at a time. Calls of fewer than 64 queries (decoding) use blocked SDPA's explicit matrices on every back end.
Shapes: `B` batch, `H` heads, `K` key heads, `C` queries of a block, `T` keys, `D` head dim.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention
from transformers.utils import is_flash_attn_2_available

from clex_train.attention.block_mask import band_mask, padded_band_mask
from clex_train.attention.partial_softmax import PartialAttention, SoftmaxRule, masked_score
from clex_train.config.attention import MAX_FLASH_HEAD_DIM
from clex_train.lm_infinite.local_window import MIN_BLOCK, attend_window, default_block_len
from clex_train.lm_infinite.stream import KeyValues, Place
from clex_train.utils import log

AUTO = "auto"
# Shorter blocks leave a GPU idle; flex_attention rejects head dims below 16.
MIN_FUSED_BLOCK, MIN_FLEX_HEAD_DIM = 1024, 16
MAX_GRAPHS = 64

logger = log.get(__name__)


class CallFacts(NamedTuple):
    """Properties of a call that decide which back ends support it."""

    query: Tensor
    values: Tensor
    rule: SoftmaxRule
    has_padding: bool
    wants_gradient: bool


@runtime_checkable
class BackEnd(Protocol):
    """An implementation of the local part."""

    recomputes: bool
    """True if blocks are recomputed in the backward pass; fused kernels store no scores and need not."""

    def unsupported_reason(self, facts: CallFacts) -> str | None:
        """Explain why this back end cannot compute such a call; None if it can."""

    def block_len(self, n_local: int) -> int:
        """Return the number of queries per block."""

    def attend(
        self, query: Tensor, window: KeyValues, place: Place, padding: Tensor | None, n_local: int, rule: SoftmaxRule
    ) -> PartialAttention:
        """Attend to the keys at 0 <= i - j < L that are not padding."""


class BlockedSdpa:
    """Explicit matrices per block; without gradients on a CPU, SDPA's fused kernel."""

    recomputes = True

    def unsupported_reason(self, facts: CallFacts) -> str | None:
        """Return None: every call is supported."""
        return None

    def block_len(self, n_local: int) -> int:
        """Return L / 2 within bounds."""
        return default_block_len(n_local)

    attend = staticmethod(attend_window)


class FlexAttention:
    """torch's flex_attention, compiled; supports gradients, padding, soft-capping and ALiBi.

    `kernel` replaces the compiled function, which needs a GPU; the uncompiled one gives the same result.
    """

    recomputes = False

    def __init__(self, kernel: Callable[..., Any] | None = None) -> None:
        self._kernel = kernel

    def unsupported_reason(self, facts: CallFacts) -> str | None:
        """See `BackEnd`."""
        if facts.query.device.type != "cuda":
            return "its kernels need a GPU"
        # torch for Windows ships without triton and would fail only when compiling.
        if find_spec("triton") is None:
            return "triton is not installed"
        if facts.query.dtype is torch.float64:
            return "its kernels do not support float64"
        if facts.rule.dropout > 0:
            return "it does not support dropout"
        if facts.rule.softcap is not None and facts.rule.slopes is not None:
            return "it supports soft-capping or ALiBi, not both"
        if facts.query.shape[-1] < MIN_FLEX_HEAD_DIM:
            return f"head dim {facts.query.shape[-1]} is below its minimum of {MIN_FLEX_HEAD_DIM}"
        return None

    def block_len(self, n_local: int) -> int:
        """Return 2 L, rounded up to tiles."""
        # Tiles outside the band are skipped, so a long block wastes no work.
        return fused_block_len(n_local)

    def attend(
        self,
        query: Float[Tensor, "B H C D"],
        window: KeyValues,
        place: Place,
        padding: Tensor | None,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """See `BackEnd`."""
        sizes = (query.shape[2], window.keys.shape[2], place.offset, n_local)
        mask = (
            band_mask(*sizes, query.device) if padding is None else padded_band_mask(*sizes, place.first_key, padding)
        )
        output, aux = (self._kernel or _compiled_flex())(
            query,
            *window,
            score_mod=_score_mod(rule, place.offset),
            block_mask=mask,
            scale=rule.scaling,
            enable_gqa=query.shape[1] != window.keys.shape[1],
            return_aux=AuxRequest(lse=True),
        )
        # A padded query sees nothing; -inf would turn into NaN in `merge`.
        return PartialAttention(output, aux.lse.clamp(min=masked_score(aux.lse.dtype)))


class FlashAttention:
    """flash-attn's sliding window, for calls without gradients."""

    recomputes = False

    def unsupported_reason(self, facts: CallFacts) -> str | None:
        """See `BackEnd`."""
        width = facts.query.shape[-1]
        if not is_flash_attn_2_available():
            return "flash-attn is not installed, or there is no GPU"
        if facts.query.device.type != "cuda" or facts.query.dtype not in (torch.float16, torch.bfloat16):
            return "it supports only float16 and bfloat16 on a GPU"
        # flash-attn's backward ignores the gradient of the log-sum-exp.
        if facts.wants_gradient:
            return "its log-sum-exp, which the merge of parts needs, has no gradient"
        if facts.has_padding:
            return "its window does not support padding"
        if facts.rule.dropout > 0:
            return "it supports dropout only without the log-sum-exp"
        if width > MAX_FLASH_HEAD_DIM or facts.values.shape[-1] != width:
            return f"it needs keys and values of one head dim, at most {MAX_FLASH_HEAD_DIM}"
        return None

    def block_len(self, n_local: int) -> int:
        """See `FlexAttention`."""
        return fused_block_len(n_local)

    def attend(
        self,
        query: Float[Tensor, "B H C D"],
        window: KeyValues,
        place: Place,
        padding: Tensor | None,
        n_local: int,
        rule: SoftmaxRule,
    ) -> PartialAttention:
        """See `BackEnd`."""
        assert padding is None
        assert place.offset + query.shape[2] == window.keys.shape[2], "its window ends at the last query"
        # Imported here because flash-attn is optional and slow to import.
        output, log_sum_exp, _ = import_module("flash_attn").flash_attn_func(
            *(x.transpose(1, 2) for x in (query, *window)),
            softmax_scale=rule.scaling,
            causal=True,
            # flash-attn counts keys to the left, excluding the query's own.
            window_size=(n_local - 1, 0),
            softcap=rule.softcap or 0.0,
            alibi_slopes=None if rule.slopes is None else rule.slopes.float(),
            # The flag that makes it return the log-sum-exp; no probabilities are formed without dropout.
            return_attn_probs=True,
        )
        return PartialAttention(output.transpose(1, 2), log_sum_exp)


BACK_ENDS: dict[str, BackEnd] = {
    "flash_attention": FlashAttention(),
    "flex_attention": FlexAttention(),
    "sdpa": BlockedSdpa(),
}
"""Back ends in the order in which `auto` tries them."""


class BackEndChoice:
    """Selection of a back end per call; logs each one once."""

    def __init__(self, requested: str) -> None:
        if requested not in (AUTO, *BACK_ENDS):
            raise ValueError(f"back_end={requested}: one of {', '.join((AUTO, *BACK_ENDS))}")
        self.requested = requested
        self._logged: set[str] = set()

    def select(self, facts: CallFacts) -> BackEnd:
        """Return the requested back end, or with `auto` the first that supports the call.

        Raises:
            ValueError: the requested back end does not support the call.
        """
        # Kernel launch and mask construction cost more than a few rows of scores.
        if facts.query.shape[2] < MIN_BLOCK:
            return BACK_ENDS["sdpa"]
        reasons = {
            name: back_end.unsupported_reason(facts)
            for name, back_end in BACK_ENDS.items()
            if self.requested in (AUTO, name)
        }
        name = next((name for name, reason in reasons.items() if reason is None), None)
        if name is None:
            raise ValueError(f"back_end={self.requested}: {reasons[self.requested]}; use back_end={AUTO}")
        if name not in self._logged:
            self._logged.add(name)
            skipped = [f"{other}: {reason}" for other, reason in reasons.items() if reason is not None]
            logger.info("lm_infinite uses %s%s", name, f" ({'; '.join(skipped)})" if skipped else "")
        return BACK_ENDS[name]


def fused_block_len(n_local: int) -> int:
    """Return 2 L in whole tiles of 128, and at least `MIN_FUSED_BLOCK`."""
    return max(MIN_FUSED_BLOCK, -(-2 * n_local // 128) * 128)


@lru_cache
def _compiled_flex() -> Callable[..., Any]:
    """Compile flex_attention, with room for one graph per dtype, window, kind of length and rule."""
    # Past its limit (8 per process) dynamo runs uncompiled, forming scores [B, H, S, T], and only warns.
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True)


def _score_mod(rule: SoftmaxRule, offset: int) -> Callable[..., Tensor] | None:
    """Return flex_attention's score_mod for soft-capping or ALiBi; None for neither."""
    # Lambdas on purpose, and the offset as a tensor: see `block_mask.band_mask`.
    softcap = rule.softcap
    if rule.slopes is not None:
        slopes, first = rule.slopes.float(), torch.tensor(offset, device=rule.slopes.device)
        return lambda score, batch, head, query, key: score - slopes[head] * (first + query - key)
    if softcap is not None:
        return lambda score, batch, head, query, key: torch.tanh(score / softcap) * softcap
    return None
