"""Check that a family supports sequence parallelism (`engine.sequence_parallel`), from its architecture alone.

The real model runs on the meta device, without weights or memory, over four tokens with positions from the middle of a
row. A recording attention back end checks that all heads of every layer reach it, and a hook that the rotary embedding
receives those positions.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from clex_train.attention.layer_probe import layer_window
from clex_train.config.attention import AttentionImplementation
from clex_train.config.root import Config
from clex_train.preflight import meta_model
from clex_train.preflight.activations import LiveBytes
from clex_train.rope.probe import find_rotary
from clex_train.utils.errors import require

NAME = "heads_of_a_part"
POSITIONS = (5, 6, 7, 8)
EXCHANGED = tuple(AttentionImplementation[name] for name in ("auto", "sdpa", "flash_attention_2"))


@dataclass
class _Seen:
    """Recorded inputs of attention and rotary embedding."""

    shape: tuple[int, int, int]
    """Query heads, key heads, head width that the all-to-all expects."""
    layers: dict[int, str | None] = field(default_factory=dict)
    """Fault of each layer's attention; None for none."""
    has_positions: bool = False


def check_sequence_parallel(config: Config, arch: PretrainedConfig) -> None:
    """Raise `ConfigError` if the model or its attention does not support sequence parallelism; needs no weights."""
    count, implementation = config.engine.sequence_parallel, config.attention.implementation
    if count == 1:
        return
    require(
        implementation in EXCHANGED,
        "attention.implementation",
        implementation.name,
        f"engine.sequence_parallel={count} attends over whole rows without a mask; use sdpa or flash_attention_2",
    )
    heads, key_heads, _ = heads_of(arch)
    possible = [n for n in range(2, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]
    require(
        count in possible,
        "engine.sequence_parallel",
        count,
        f"model_type={arch.model_type} has {heads} attention heads and {key_heads} key heads, which {count} ranks "
        f"cannot share evenly; take {' or '.join(map(str, [1, *possible]))}",
    )
    reason = why_not(arch, config.data.seq_len)
    require(
        reason is None,
        "engine.sequence_parallel",
        count,
        f"model_type={arch.model_type} cannot have its rows shared: {reason}; set it to 1",
    )


def why_not(arch: PretrainedConfig, row_len: int) -> str | None:
    """Explain why ranks cannot share rows of `row_len` tokens of a model; None if they can."""
    try:
        model = meta_model.on_meta(arch, torch.float32, NAME).eval()
        seen = _look_at(model, heads_of(arch))
    except Exception as error:
        # Any failure of the probe means that the family is not known to work.
        return f"it cannot be called with a part of a row ({f'{error!r}'.splitlines()[0]})"
    wrong = {layer: seen.layers.get(layer, MISSING) for layer in range(arch.get_text_config().num_hidden_layers)}
    named = [f"layer {layer} {what}" for layer, what in wrong.items() if what is not None]
    mixing = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    windows = [layer_window(m) or row_len for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]
    reasons = {
        next(iter(named), ""): bool(named),
        f"{next(iter(mixing), '')} mixes tokens outside the attention": bool(mixing),
        f"a layer sees {min(windows, default=row_len)} tokens only, which need a mask": any(
            w < row_len for w in windows
        ),
        "its rotary embedding does not take the positions it is given": not seen.has_positions,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


MISSING = "does not go through transformers' attention interface"


def heads_of(arch: PretrainedConfig) -> tuple[int, int, int]:
    """Return query heads, key heads and head width of a layer."""
    shape: Any = arch.get_text_config()
    heads = shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return heads, getattr(shape, "num_key_value_heads", None) or heads, width


def _look_at(model: Any, shape: tuple[int, int, int]) -> _Seen:
    seen = _Seen(shape)
    position_ids = torch.tensor([POSITIONS])
    tokens = torch.zeros_like(position_ids, device="meta")

    def positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and not value.is_meta]
        seen.has_positions = any(torch.equal(value, position_ids) for value in given)
        moved = {name: _to_meta(value) for name, value in kwargs.items()}
        return tuple(map(_to_meta, args)), moved

    hook = find_rotary(model).module.register_forward_pre_hook(positions, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.part_seen = seen
    try:
        with torch.no_grad(), LiveBytes(model):
            model(input_ids=tokens, position_ids=position_ids, use_cache=False)
    finally:
        hook.remove()
    return seen


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _look(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Record faults of the inputs; an attention function that computes nothing."""
    seen: _Seen = module.part_seen
    seen.layers[module.layer_idx] = _wrong_with(module, seen.shape, query, key, value, kwargs)
    batch, heads, tokens, _width = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def _wrong_with(
    module: Any, shape: tuple[int, int, int], query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> str | None:
    heads, key_heads, width = shape
    expected = [(1, count, len(POSITIONS), width) for count in (heads, key_heads, key_heads)]
    if [tuple(tensor.shape) for tensor in (query, key, value)] != expected:
        return "has heads of more than one width, or another number than its config"
    if any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        return "has a term for each head in addition to its keys"
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        return "is not causal"
    return None


AttentionInterface.register(NAME, _look)
