"""Check that a family masks the documents of a packed row from each other, from its architecture alone.

The real model runs on the meta device, without weights or memory, over a row of documents with real positions. A
recording attention back end checks the inputs of each layer: a mask that is False between documents, from which every
back end is built, and for flash attention the lengths of the documents.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from clex_train.attention.document_mask import document_mask_kwargs
from clex_train.config.attention import AttentionImplementation
from clex_train.config.root import Config
from clex_train.config.scaling import LogScale
from clex_train.models import official
from clex_train.preflight import meta_model
from clex_train.preflight.activations import LiveBytes
from clex_train.rope.probe import find_rotary
from clex_train.utils.errors import ConfigError, require

NAME = "borders_of_documents"
LENGTHS = ((3, 1, 4), (1, 5, 2))
"""Lengths of the documents of the two test rows, among them a document of a single token."""


@dataclass
class _Seen:
    """Expected and recorded inputs of the attention; `layers` maps each layer to True if documents were masked."""

    apart: Tensor
    """bool [B, S, S]: a query and a key of different documents."""
    lengths: Tensor | None
    """The lengths that flash attention needs; None for another back end."""
    layers: dict[int, bool] = field(default_factory=dict)


def check_document_mask(config: Config, arch: PretrainedConfig, context_len: int) -> None:
    """Raise `ConfigError` if the model or the log-scaling does not support `data.document_mask`; needs no weights."""
    if not config.data.document_mask:
        return
    policy = _log_scale(config)
    beyond = policy is LogScale.always and config.data.seq_len > context_len
    require(
        not beyond and policy is not LogScale.official,
        "scaling.log_scale",
        policy.name,
        f"it counts the tokens of a row (data.seq_len={config.data.seq_len}, L={context_len}), not of its documents; "
        "with data.document_mask=true use off, eval or token",
    )
    require_separable(arch, config.attention.implementation)


def require_separable(arch: PretrainedConfig, implementation: AttentionImplementation) -> None:
    """Raise `ConfigError`, naming the model type, if documents of a row would see each other; needs no weights."""
    kind = arch.model_type
    try:
        model = meta_model.on_meta(arch, torch.float32, NAME).eval()
        seen = _layers_seen(model, implementation)
    except Exception as error:
        # Any failure of the probe means that the family is not known to work.
        first_line = f"{error!r}".splitlines()[0]
        raise ConfigError(
            "data.document_mask",
            "True",
            f"model_type={kind} does not take the borders of documents the way transformers' "
            f"families do ({first_line}); set it to false",
        ) from error
    leaking = [layer for layer in range(arch.get_text_config().num_hidden_layers) if not seen.get(layer, False)]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    reason = None
    if not seen:
        reason = "its attention is not reached through transformers' attention interface"
    elif leaking:
        reason = f"layer {leaking[0]} and {len(leaking) - 1} others mix tokens without regard to borders of documents"
    elif convolutions:
        reason = f"{convolutions[0]} mixes tokens across borders of documents"
    require(reason is None, "data.document_mask", True, f"model_type={kind} cannot: {reason}; set it to false")


def _log_scale(config: Config) -> LogScale:
    """Return the log-scaling of the run: that of a checkpoint of the original code takes precedence."""
    directory = Path(str(config.model.path))
    brings = config.model.is_pretrained and official.is_official(directory)
    own = LogScale(official.log_scale_policy(directory)) if brings else LogScale.off
    return config.scaling.log_scale if own is LogScale.off else own


def _layers_seen(model: Any, implementation: AttentionImplementation) -> dict[int, bool]:
    """Map each layer whose attention was called to True if it masked the documents from each other."""
    position_ids = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    documents = position_ids.eq(0).cumsum(1)
    arguments = document_mask_kwargs(position_ids, implementation, position_ids.device)
    seen = _Seen(documents[:, :, None] != documents[:, None, :], arguments.get("cu_seq_lens_q"))
    hook = find_rotary(model).module.register_forward_pre_hook(_positions_to_meta, with_kwargs=True)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.borders_seen = seen
    try:
        with torch.no_grad(), LiveBytes(model):
            model(input_ids=torch.zeros_like(position_ids, device="meta"), use_cache=False, **arguments)
    finally:
        hook.remove()
    return seen.layers


def _positions_to_meta(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    return tuple(map(moved, args)), {name: moved(value) for name, value in kwargs.items()}


def _look(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Record whether the mask separates the documents; an attention function that computes nothing."""
    seen: _Seen = module.borders_seen
    apart = attention_mask is not None and not bool((attention_mask[:, 0] & seen.apart).any())
    if seen.lengths is not None:
        apart = apart and kwargs.get("cu_seq_lens_q") is seen.lengths
    seen.layers[module.layer_idx] = apart and seen.layers.get(module.layer_idx, True)
    batch, heads, tokens, _width = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Build the mask of the sdpa back end, never omitted, on the CPU like the positions."""
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "device": torch.device("cpu")})
    return mask


AttentionInterface.register(NAME, _look)
AttentionMaskInterface.register(NAME, _mask)
