"""Probe the attention of each layer on the meta device to learn how it uses positions.

A layer's attention is rebuilt from its config without weights and called with two tokens. Autograd then shows whether
the keys depend on cos and sin, and an attention function of ours records what the layer passes on. No model family is
named. Shapes: `S` tokens, `W` width of cos.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

NAME = "layer_probe"
POSITION_EMBEDDINGS = "position_embeddings"
PLAIN_TYPES = (bool, int, float, str, type(None))


@dataclass
class LayerProbe:
    """Use of positions by one attention module."""

    rotates: bool | None = None
    """True if its keys depend on cos and sin; None if the probe failed."""
    rotated_part: str = "keys"
    """Part of a cache layer that holds the rotated keys: `keys`, or `values` under latent attention."""
    rotated_width: int = 0
    """Components per head of that part."""
    reason: str = ""
    """Error of a failed probe, in one line."""
    reached_interface: bool = False
    """True if it called a function of transformers' attention interface."""
    makes_mask: bool = False
    """True if it passed on a mask although it was given none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments to the attention function other than queries, keys, values and mask."""


class _StopForward(Exception):
    """Ends the forward pass of a probe inside the attention function."""


class _RecordingCache(DynamicCache):  # type: ignore[misc]  # mypy does not follow transformers
    """A cache that records the first update and returns its input."""

    parts: dict[str, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.parts = self.parts or {"keys": key_states, "values": value_states}
        return key_states, value_states


def rotary_attention(model: nn.Module) -> list[Any]:
    """Find the attention module of every layer that takes cos and sin, in the order of the layers."""
    found = [
        module for module in _innermost_with_positions(model) if isinstance(getattr(module, "layer_idx", None), int)
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def probe_layers(
    modules: list[Any],
    cos_shape: Callable[[Any], tuple[int, ...] | None],
    config: Any = None,
    is_complex: bool = False,
) -> list[LayerProbe]:
    """Probe every module, once per group of identical ones.

    `cos_shape` maps a module to the shape of its cos, None if unknown. `config` is the model's, for modules without
    one. `is_complex` is True where attention takes one tensor cos + i sin.
    """
    known: dict[Any, LayerProbe] = {}
    probes = []
    for module in modules:
        shape = cos_shape(module)
        # A model of 80 layers has one or two kinds of attention; a probe of each kind suffices.
        key = (shape, *_distinguishing_values(module))
        if key not in known:
            known[key] = (
                LayerProbe(reason="no cos and sin for its type")
                if shape is None
                else probe_layer(module, shape, config, is_complex)
            )
        probes.append(known[key])
    return probes


def probe_layer(module: Any, cos_shape: tuple[int, ...], config: Any = None, is_complex: bool = False) -> LayerProbe:
    """Probe an attention module with cos and sin of `cos_shape` [1, S, W]; its weights may be anywhere, or sharded."""
    probe, recorder, config = LayerProbe(), _RecordingCache(), getattr(module, "config", config)
    dtype = torch.complex64 if is_complex else torch.float32
    cos, sin = (torch.empty(cos_shape, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))

    def reached(
        _: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> None:
        probe.makes_mask, probe.options = attention_mask is not None, options
        recorder.parts = recorder.parts or {"keys": key, "values": value}
        # Everything of interest is known here; the rest of the forward would only need more arguments.
        raise _StopForward

    # Registered again by every probe, since the function closes over its recorder.
    AttentionInterface.register(NAME, reached)
    try:
        # The caller may be in inference mode or no_grad, where autograd would see no dependence.
        with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
            twin = _without_weights(module, config)
            hidden = torch.empty(1, cos_shape[1], config.hidden_size)
            # Call `forward` itself: hooks that were copied to the twin must not run.
            type(twin).forward(twin, **_arguments(twin, hidden, cos if is_complex else (cos, sin), recorder))
    except _StopForward:
        probe.reached_interface = True
    except Exception as error:
        # Any failure is an answer: the caller decides what an unknown layer may be used for.
        probe.reason = f"{type(error).__name__}: {error}"
    if recorder.parts is not None:
        rotated = [name for name, states in recorder.parts.items() if _depends(states, cos, sin)]
        probe.rotates = bool(rotated)
        probe.rotated_part = rotated[0] if rotated else "keys"
        probe.rotated_width = recorder.parts[probe.rotated_part].shape[-1]
    return probe


def layer_window(attention: Any) -> int | None:
    """Return the largest number of keys that a layer sees, by a window or a chunk; None for full attention."""
    config, kind = getattr(attention, "config", None), layer_type(attention)
    if kind == "full_attention":
        return None
    if kind == "chunked_attention":
        # Only the last token of a chunk sees the whole of it.
        return getattr(config, "attention_chunk_size", None)
    # Some families keep the window on the module, others in the config for all layers.
    has_own = hasattr(attention, "sliding_window")
    window = attention.sliding_window if has_own else getattr(config, "sliding_window", None)
    # Qwen2-MoE writes 0 for "no window".
    return window or None


def layer_type(attention: Any) -> str | None:
    """Return a layer's type from its config; None for a model without layer types."""
    types = getattr(getattr(attention, "config", None), "layer_types", None)
    return None if types is None else str(types[attention.layer_idx])


@functools.cache
def parameter_names(forward: Callable[..., Any]) -> list[str]:
    """List the parameters of a method without `self`; cached for hooks that run in every decoding step."""
    return list(inspect.signature(forward).parameters)[1:]


def _innermost_with_positions(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the innermost modules that take cos and sin; decoder layers only pass them on."""
    inner = [found for child in module.children() for found in _innermost_with_positions(child)]
    if inner:
        yield from inner
    elif POSITION_EMBEDDINGS in inspect.signature(type(module).forward).parameters:
        yield module


def _distinguishing_values(module: Any) -> tuple[Any, ...]:
    """Collect what distinguishes a layer from others of its class: plain attributes and per-layer config entries."""
    # A module without a config contributes no lists: the stand-in is an empty module.
    index, lists = module.layer_idx, vars(getattr(module, "config", None) or nn.Module())
    own = [
        (name, value) for name, value in vars(module).items() if isinstance(value, PLAIN_TYPES) and name != "layer_idx"
    ]
    listed = [(n, v[index]) for n, v in lists.items() if isinstance(v, (list, tuple)) and index < len(v)]
    return (type(module), *own, *((name, value) for name, value in listed if isinstance(value, PLAIN_TYPES)))


def _without_weights(module: Any, config: Any) -> Any:
    """Rebuild the module from its config with the recording attention function, in evaluation mode."""
    # The copy keeps the probe's attention name out of the model that is being probed.
    config = copy.deepcopy(config)
    config._attn_implementation = NAME
    known = {"config": config, "layer_idx": module.layer_idx}
    wanted = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    # Constructors take different extras (`is_cross_attention`, ...), which the live module usually has as attributes.
    given = {each.name: known.get(each.name, getattr(module, each.name, each.default)) for each in wanted}
    return type(module)(**given).eval()


def _arguments(twin: Any, hidden: Tensor, pair: Tensor | tuple[Tensor, Tensor], cache: DynamicCache) -> dict[str, Any]:
    """Choose arguments for `forward` by its parameters; None for required ones that do not matter here."""
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(type(twin).forward).parameters.items())[1:]:
        if name == "hidden_states":
            arguments[name] = hidden
        elif name == POSITION_EMBEDDINGS:
            arguments[name] = pair
        elif name == "position_ids":
            arguments[name] = torch.arange(hidden.shape[1])[None]
        elif "Cache" in str(parameter.annotation):
            arguments[name] = cache
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments[name] = None
    return arguments


def _depends(keys: Tensor, *inputs: Tensor) -> bool:
    """Return True if any of `inputs` contributes to `keys`."""
    if not keys.requires_grad:
        return False
    with torch.enable_grad():
        # A backward on the meta device costs nothing and needs a scalar.
        total = keys.sum()
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    return any(gradient is not None for gradient in gradients)
