"""Log-scaling of one length as a constant s, for engines that cannot follow the length.

    s = log(N) / log(L) for N tokens, by layer: one with a sliding window counts no more keys than its window

Folded into queries it is exact in every engine: softmax((s q) k) = softmax(s (q k)). It goes into q_proj (weight and
bias), the query rows of a fused projection, or the norm of the queries where one follows, which would undo it before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from clex_train.attention.layer_probe import rotary_attention
from clex_train.attention.log_scaling import LogScaling
from clex_train.config.scaling import LogScale
from clex_train.utils.errors import ConfigError

if TYPE_CHECKING:
    from clex_train.export.factors import Source

Change = Callable[[Tensor], Tensor]

NORMS = ("q_norm", "q_layernorm", "query_layernorm")
QUERY, THIRDS, STACKED = "q_proj", "query_key_value", "qkv_proj"
"""Projection of the queries alone; fused head by head [H, 3, D] (GPT-NeoX); fused one after the other (Phi-3)."""
KNOWN = {*NORMS, QUERY, THIRDS, STACKED, "k_proj", "v_proj", "o_proj", "dense", "out_proj", "rotary_emb"} | {
    "k_norm", "k_layernorm", "key_layernorm", "attention_dropout",
}  # fmt: skip
"""Children of attention modules between which nothing acts on queries but a projection and a norm."""
REMEDY = "log_scale=off leaves it out"


@dataclass(frozen=True)
class Layer:
    """Attention of one layer and its constant."""

    name: str
    module: Any
    scale: float


def layers(source: Source, num_tokens: int, policy: LogScale) -> list[Layer]:
    """List the attention of every layer with its s at `num_tokens`; empty for `off`.

    Raises:
        ConfigError: a policy that gives each query a factor of its own.
    """
    if policy is LogScale.off:
        return []
    if policy.counts_each_token:
        # Temperatures of other families (Llama 4, Ministral 3) move in steps of L tokens, and by another formula.
        raise ConfigError(
            "log_scale",
            policy.name,
            "every query has a factor of its own position, which no config.json states and no constant in the weights "
            f"replaces; {REMEDY}",
        )
    # A constant holds in training too, which `eval` leaves out.
    rule = LogScale.always if policy is LogScale.eval else policy
    model, scaling = source.handle.model, LogScaling(source.handle.model, rule.value, source.context_len)
    named: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if hasattr(m, "layer_idx")]
    named = [(name, module) for name, module in named if isinstance(getattr(module, "scaling", None), (float, int))]
    before = [module.scaling for _, module in named]
    scaling.follow(num_tokens)
    found = [Layer(name, each, each.scaling / was) for (name, each), was in zip(named, before, strict=True)]
    scaling.undo()
    return found


def of_all(source: Source, found: list[Layer]) -> float:
    """Return the s that all layers share, 1 without log-scaling; `ConfigError` if they differ."""
    scales = {layer.scale for layer in found} or {1.0}
    if max(scales) - min(scales) > 1e-12:
        raise ConfigError("log_scale", source.log_scale.name, f"layers with windows have another constant; {REMEDY}")
    return max(scales)


def as_magnitude(source: Source, found: list[Layer], rotary_dim: int, head_dim: int) -> float:
    """Return sqrt(s), by which cos and sin express the constant; `ConfigError` where they reach more or less.

    Unlike folding this leaves the weights alone, but needs heads that rotate whole in exactly the layers that scale.
    """
    scale = max((layer.scale for layer in found), default=1.0)
    rotated = source.handle.scaled_layers
    positions = {module.layer_idx for module in rotary_attention(source.handle.model)}
    expected = {index: scale if rotated.get(index) else 1.0 for index in positions}
    same = all(abs(layer.scale - expected.get(layer.module.layer_idx, 1.0)) < 1e-12 for layer in found)
    # Under latent attention `head_dim` is that of the rotated part alone.
    latent = hasattr(source.arch.get_text_config(), "qk_rope_head_dim")
    if scale != 1.0 and (latent or rotary_dim != head_dim or not same):
        raise ConfigError(
            "log_scale",
            source.log_scale.name,
            "log-scaling reaches whole heads of every layer, and the RoPE of a config only a part of them",
        )
    return float(scale**0.5)


def changes(found: list[Layer], config: PretrainedConfig, read: Callable[[str], Tensor]) -> dict[str, Change]:
    """Map names of tensors to the function that folds s into them; `read` returns a stored tensor by its name.

    Raises:
        ConfigError: the queries of the family go through something else than a projection and a norm.
    """
    clip = getattr(config.get_text_config(), "clip_qkv", None)
    if clip is not None and found:
        raise _unknown(config, f"clip_qkv={clip} cuts the queries after their projection")
    folded: dict[str, Change] = {}
    for layer in found:
        if layer.scale != 1.0:
            folded |= dict(_layer_changes(layer, config, read))
    return folded


def _layer_changes(
    layer: Layer, config: PretrainedConfig, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Change]]:
    children = dict(layer.module.named_children())
    if odd := sorted(set(children) - KNOWN):
        raise _unknown(config, f"its attention has {', '.join(odd)}")
    norm = next((name for name in NORMS if name in children), None)
    if norm is not None:
        yield from _norm_changes(f"{layer.name}.{norm}", children[norm], layer.scale, config, read)
        return
    projection = next((name for name in (QUERY, THIRDS, STACKED) if name in children), None)
    if projection is None:
        raise _unknown(config, "its attention has no projection of queries under a known name")
    rows = _query_rows(projection, children[projection], layer.module, config)
    for name, _ in children[projection].named_parameters():
        yield f"{layer.name}.{projection}.{name}", _scaled_rows(rows, layer.scale)


def _norm_changes(
    name: str, norm: nn.Module, scale: float, config: PretrainedConfig, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Change]]:
    parameters = {own for own, _ in norm.named_parameters()}
    if "weight" not in parameters or parameters - {"weight", "bias"}:
        raise _unknown(config, f"{name} has the parameters {', '.join(sorted(parameters)) or 'none'}")
    # Gemma's norms multiply by 1 + weight, others by weight; a weight of zeros tells them apart.
    offset = _offset(norm, read(f"{name}.weight"))
    yield f"{name}.weight", lambda tensor: tensor * scale + offset * (scale - 1)
    if "bias" in parameters:
        yield f"{name}.bias", lambda tensor: tensor * scale


def _offset(norm: nn.Module, weight: Tensor) -> float:
    """Return c of a norm that multiplies by c + weight, 0 or 1."""
    given = {name: torch.zeros(weight.shape) for name, _ in norm.named_parameters()}
    x = torch.linspace(1, 2, weight.numel()).view(weight.shape)
    return float(torch.func.functional_call(norm, given, (x,)).abs().max() > 0)


def _query_rows(name: str, projection: nn.Module, attention: Any, config: PretrainedConfig) -> Tensor:
    """Return a mask [rows] of the rows that project queries."""
    num_rows = int(projection.weight.shape[0])  # type: ignore[index]
    if name == QUERY:
        return torch.ones(num_rows, dtype=torch.bool)
    text: Any = config.get_text_config()
    heads = int(text.num_attention_heads)
    dim = int(getattr(attention, "head_dim", None) or getattr(attention, "head_size", 0) or text.hidden_size // heads)
    rows = torch.zeros(num_rows, dtype=torch.bool)
    if name == STACKED:
        rows[: heads * dim] = True
        return rows
    if num_rows != 3 * heads * dim:
        raise _unknown(config, f"{name} has {num_rows} rows, not three for each component of {heads} heads")
    rows.view(heads, 3, dim)[:, 0] = True
    return rows


def _scaled_rows(rows: Tensor, scale: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        factor = torch.where(rows, scale, 1.0).to(tensor)
        return tensor * (factor[:, None] if tensor.dim() == 2 else factor)

    return change


def _unknown(config: PretrainedConfig, reason: str) -> ConfigError:
    return ConfigError("log_scale", "folded", f"model_type={config.model_type}: {reason}; {REMEDY}")
