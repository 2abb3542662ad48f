"""Adapters for models whose attention bypasses transformers' attention interface: GPT-J, Falcon, MPT and Bloom.

An adapter computes a family's queries, keys and values and finishes its output, using the module's own weights and
functions. The module's `forward` is replaced on the instance until `undo`.
Shapes: `B` batch, `H` heads, `K` key heads, `S` tokens, `D` head dim, `E` hidden size.
"""

import math
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clex_train.attention.partial_softmax import SoftmaxRule
from clex_train.lm_infinite.rotation import TableRotation
from clex_train.lm_infinite.stream import NoRotation, Rotation


@runtime_checkable
class Adapter(Protocol):
    """Split of one family's attention into steps before and after the softmax."""

    def project(self, module: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute unrotated queries [B, H, S, D], keys and values [B, K, S, D] from `hidden` [B, S, E]."""

    def finish(self, module: Any, attended: Tensor, call: dict[str, Any]) -> Tensor:
        """Compute the module's output from `attended` [B, S, H * D]."""

    def softmax(self, module: Any, device: torch.device) -> SoftmaxRule:
        """Return the module's scale, dropout and ALiBi slopes."""


class GptJ:
    """GPT-J: interleaved rotation of the leading `rotary_dim` components, from a table in each attention module."""

    def project(self, module: Any, hidden: Float[Tensor, "B S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        heads = (module.num_attention_heads, module.head_dim)
        made = (linear(hidden) for linear in (module.q_proj, module.k_proj, module.v_proj))
        query, key, value = (x.unflatten(-1, heads).transpose(1, 2) for x in made)
        return query, key, value

    def finish(self, module: Any, attended: Float[Tensor, "B S E"], call: dict[str, Any]) -> Tensor:
        """See `Adapter`."""
        finished: Tensor = module.resid_dropout(module.out_proj(attended))
        return finished

    def softmax(self, module: Any, device: torch.device) -> SoftmaxRule:
        """See `Adapter`."""
        return SoftmaxRule(1 / math.sqrt(module.head_dim), module.config.attn_pdrop if module.training else 0.0)


class Falcon:
    """Falcon: RoPE by the model's rotary module, or ALiBi with slopes scaled like the scores."""

    def project(self, module: Any, hidden: Float[Tensor, "B S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden)))
        return query, key, value

    def finish(self, module: Any, attended: Float[Tensor, "B S E"], call: dict[str, Any]) -> Tensor:
        """See `Adapter`."""
        finished: Tensor = module.dense(attended)
        return finished

    def softmax(self, module: Any, device: torch.device) -> SoftmaxRule:
        """Return the softmax rule; the family drops attention weights with ALiBi only."""
        scale = 1 / math.sqrt(module.head_dim)
        if not module.config.alibi:
            return SoftmaxRule(scale)
        dropout = module.attention_dropout.p if module.training else 0.0
        # Falcon applies 1 / sqrt(D) after adding the bias, so the slopes are scaled too.
        return SoftmaxRule(scale, dropout, slopes=_alibi_slopes(module, device) * scale)


class Mpt:
    """MPT: ALiBi and clamped projections."""

    def project(self, module: Any, hidden: Float[Tensor, "B S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        mixed = module.Wqkv(hidden)
        if module.clip_qkv:
            mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv)
        heads = (module.n_heads, module.head_dim)
        query, key, value = (x.unflatten(-1, heads).transpose(1, 2) for x in mixed.chunk(3, dim=2))
        return query, key, value

    def finish(self, module: Any, attended: Float[Tensor, "B S E"], call: dict[str, Any]) -> Tensor:
        """See `Adapter`."""
        finished: Tensor = module.out_proj(attended)
        return finished

    def softmax(self, module: Any, device: torch.device) -> SoftmaxRule:
        """See `Adapter`."""
        slopes = _mpt_slopes(sys.modules[type(module).__module__].build_mpt_alibi_tensor, module.n_heads, device)
        return SoftmaxRule(module.softmax_scale, module.attn_dropout_p if module.training else 0.0, slopes=slopes)


class Bloom:
    """Bloom: ALiBi; the attention module adds the residual itself."""

    def project(self, module: Any, hidden: Float[Tensor, "B S E"]) -> tuple[Tensor, Tensor, Tensor]:
        """See `Adapter`."""
        query, key, value = module._reshape(module.query_key_value(hidden))
        return query, key, value

    def finish(self, module: Any, attended: Float[Tensor, "B S E"], call: dict[str, Any]) -> Tensor:
        """See `Adapter`."""
        # Decoder layers expect the sum, so the residual from the call must be added here.
        dropped = nn.functional.dropout(module.dense(attended), module.hidden_dropout, module.training)
        residual: Tensor = call["residual"]
        return residual + dropped

    def softmax(self, module: Any, device: torch.device) -> SoftmaxRule:
        """See `Adapter`."""
        dropout = module.attention_dropout.p if module.training else 0.0
        return SoftmaxRule(module.inv_norm_factor, dropout, slopes=_alibi_slopes(module, device))


ADAPTERS: dict[str, Adapter] = {"gptj": GptJ(), "falcon": Falcon(), "mpt": Mpt(), "bloom": Bloom()}
"""Adapters by model type."""


class SinusoidTables:
    """GPT-J's rotation for positions 0..M-1; the model's own table ends at its trained context."""

    def __init__(self, module: Any, num_positions: int) -> None:
        self.module, self.num_positions = module, num_positions
        self._known: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def rotation(self, x: Tensor) -> Rotation:
        """Return the rotation in the dtype and on the device of `x`."""
        source, width = sys.modules[type(self.module).__module__], self.module.rotary_dim or self.module.embed_dim
        key = (x.dtype, x.device)
        if key not in self._known:
            # The tables are cached and used in training too, where inference tensors are refused.
            with torch.inference_mode(mode=False):
                table = source.create_sinusoidal_positions(self.num_positions, width).to(x.device, x.dtype)
                sin, cos = table[None].chunk(2, dim=-1)
            self._known[key] = cos, sin
        function = source.apply_rotary_pos_emb
        return TableRotation(
            # The family's function takes [B, S, H, D], and sin before cos.
            *self._known[key],
            width,
            lambda x, cos, sin: function(x.transpose(1, 2), sin, cos).transpose(1, 2),
        )


def clamp_table_positions(model: nn.Module) -> list[RemovableHandle]:
    """Add hooks that clamp the positions at which GPT-J reads its table of sines.

    Since transformers 5.24 the model reads it once for all layers.
    """
    hooks = []
    for module in model.modules():
        table = getattr(module, "embed_positions", None)
        if isinstance(table, Tensor) and not hasattr(module, "layer_idx"):
            # The values read are unused (`SinusoidTables` replaces them), but an index beyond the table would raise.
            last = len(table) - 1
            hooks.append(module.register_forward_pre_hook(partial(_clamp_positions, last), with_kwargs=True))
    return hooks


def _clamp_positions(
    last: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def clamped(value: Any) -> Any:
        return value.clamp(max=last) if isinstance(value, Tensor) and not value.is_floating_point() else value

    return tuple(map(clamped, args)), {name: clamped(value) for name, value in kwargs.items()}


def uses_alibi(module: Any, kind: str) -> bool:
    """Return True if positions enter by ALiBi."""
    return kind in ("mpt", "bloom") or (kind == "falcon" and bool(module.config.alibi))


def no_rotation(x: Tensor) -> Rotation:
    """Return the identity rotation, for ALiBi."""
    return NoRotation()


def _alibi_slopes(module: Any, device: torch.device) -> Float64[Tensor, " H"]:
    return _slopes_from_bias(sys.modules[type(module).__module__].build_alibi_tensor, module.num_heads, device)


@lru_cache
@torch.inference_mode(mode=False)
def _slopes_from_bias(build: Callable[..., Tensor], num_heads: int, device: torch.device) -> Float64[Tensor, " H"]:
    """Read the slopes off the ALiBi bias of two tokens."""
    # Falcon and Bloom build slope * index: 0 and the slope.
    return build(torch.ones(1, 2, device=device), num_heads, torch.float32)[:, 0, 1].double()


@lru_cache
@torch.inference_mode(mode=False)
def _mpt_slopes(build: Callable[..., Tensor], num_heads: int, device: torch.device) -> Float64[Tensor, " H"]:
    """Read MPT's slopes off its ALiBi bias of two tokens."""
    # MPT builds the bias from the distance to the last key: minus the slope, and 0.
    return -build(num_heads, 2, device=device)[:, 0, 0].double()
