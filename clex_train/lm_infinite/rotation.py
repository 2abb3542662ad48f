"""Rotation by a Hugging Face model's own frequencies, at positions of our choosing.

cos and sin come from the model's current rotary module (the stock one, or one that follows a frequency table) and are
applied by the family's own `apply_rotary_pos_emb`.
Shapes: `B` batch, `H` heads, `S` tokens, `D` head dim, `M` positions.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clex_train.utils.errors import ConfigError

RotateFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class TableRotation:
    """Rotation by tables of cos and sin [1, M, W] for positions 0..M-1; non-rotary components pass through."""

    def __init__(self, cos: Tensor, sin: Tensor, rotary_dim: int, rotate: RotateFunction) -> None:
        self.cos, self.sin, self.rotary_dim, self.rotate = cos, sin, rotary_dim, rotate

    def consecutive(self, x: Float[Tensor, "B H S D"], first: int) -> Float[Tensor, "B H S D"]:
        """Rotate `x` with its tokens at positions first, first + 1, ..."""
        last = first + x.shape[2]
        return self._apply(x, self.cos[:, first:last], self.sin[:, first:last])

    def constant(self, x: Float[Tensor, "B H S D"], position: int) -> Float[Tensor, "B H S D"]:
        """Rotate `x` with every token at `position`, which may be negative."""
        where = slice(abs(position), abs(position) + 1)
        # cos is even and sin is odd, so a table of positive positions serves negative ones.
        sin = self.sin[:, where] if position >= 0 else -self.sin[:, where]
        return self._apply(x, self.cos[:, where], sin)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotated = self.rotate(x[..., : self.rotary_dim], cos, sin)
        return rotated if self.rotary_dim == x.shape[-1] else torch.cat((rotated, x[..., self.rotary_dim :]), dim=-1)


class RotarySite(NamedTuple):
    """Place of the rotary module in a model. The module there may be replaced at any time."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> Any:
        """The current rotary module."""
        return getattr(self.parent, self.name)

    def cos_shape(self, layer_type: str | None) -> tuple[int, ...]:
        """Return the shape [1, 2, W] of cos for two tokens in a layer of `layer_type`."""
        rotary = self.module
        buffer = next(rotary.buffers(), None)
        x = torch.empty(1, 1, 1, device="cpu" if buffer is None else buffer.device)
        return tuple(_cos_sin(rotary, x, 2, _call_layer_type(rotary, layer_type))[0].shape)


class RotationTables:
    """Tables for positions 0..M-1 by layer type, rebuilt only when the model's frequencies change."""

    def __init__(self, site: RotarySite, num_positions: int) -> None:
        self.site, self.num_positions = site, num_positions
        self._known: dict[tuple[Any, ...], tuple[Any, Tensor, Tensor]] = {}

    def rotation(self, x: Tensor, layer_idx: int, layer_type: str | None, rotate: RotateFunction) -> TableRotation:
        """Return the rotation of layer `layer_idx` of `layer_type`, in the dtype and on the device of `x`."""
        rotary = self.site.module
        if getattr(rotary, "positions", None) is not None:
            raise ValueError(
                "attention=lm_infinite sees tokens at their true distances and does not support sampled positions; "
                "train with scaling.positions=plain"
            )
        layer_type = _call_layer_type(rotary, layer_type)
        # Inference mode is part of the key: its tables could not be used in training.
        is_local = layer_idx in getattr(rotary, "local_layers", ())
        key, state = (layer_type, is_local, x.dtype, x.device, torch.is_inference_mode_enabled()), _state(rotary)
        known = self._known.get(key)
        if known is None or known[0] != state:
            known = (state, *_cos_sin(rotary, x, self.num_positions, layer_type, is_local))
            # With gradients into the frequencies, each call needs a graph of its own.
            if not known[1].requires_grad:
                self._known[key] = known
        return TableRotation(known[1], known[2], 2 * _num_pairs(rotary, layer_type), rotate)


def find_rotary_site(model: nn.Module) -> RotarySite:
    """Find the one module that maps (x, position_ids) to (cos, sin); `ConfigError` names the model type otherwise."""
    sites = [
        RotarySite(parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if list(inspect.signature(type(child).forward).parameters)[1:3] == ["x", "position_ids"]
    ]
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if len(sites) != 1:
        raise ConfigError("model_type", kind, f"{len(sites)} rotary modules where lm_infinite needs exactly one")
    types = getattr(sites[0].module, "rope_type", "default")
    for rope_type in types.values() if isinstance(types, dict) else [types]:
        # Such a module picks its frequencies by the largest position it is called with, which here is a table's length.
        if any(name in str(rope_type) for name in ("dynamic", "longrope")):
            raise ConfigError(
                "rope_type",
                f"{rope_type} of model_type={kind}",
                "its frequencies change with the sequence length; "
                "set rope_type to `default` in rope_parameters of config.json",
            )
    return sites[0]


def rotation_function(attention: nn.Module) -> RotateFunction:
    """Return the family's rotation of one tensor; `ConfigError` if its module has none of the usual signature."""
    source = sys.modules[type(attention).__module__]
    function = getattr(source, "apply_rotary_pos_emb", None)
    if function is None or list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        raise ConfigError(
            type(attention).__name__,
            None,
            "no function apply_rotary_pos_emb(q, k, cos, sin), so lm_infinite cannot rotate its keys",
        )
    # The family's function rotates a query and a key; an empty key costs nothing.
    return partial(_rotate_one, function)


def _rotate_one(function: Callable[..., Any], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated: Tensor = function(x, x[:, :0], cos, sin)[0]
    return rotated


def _cos_sin(
    rotary: Any, x: Tensor, num_positions: int, layer_type: str | None, is_local: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the tables of cos and sin for positions 0..num_positions-1."""
    positions = torch.arange(num_positions, device=x.device)[None]
    like = torch.empty(1, 1, 1, dtype=x.dtype, device=x.device)
    # Our rotary module records the positions of the model's calls; this call must not replace them.
    noted = getattr(rotary, "last_position_ids", None)
    found = rotary(like, positions) if layer_type is None else rotary(like, positions, layer_type)
    if not isinstance(found, tuple) or len(found) not in (2, 4):
        raise ConfigError(type(rotary).__name__, None, "it does not return cos and sin, so lm_infinite cannot use it")
    # Our rotary module returns the pair of local layers after that of the others.
    cos, sin = found[2:] if is_local else found[:2]
    if noted is not None:
        rotary.last_position_ids = noted
    return cos.to(x.dtype), sin.to(x.dtype)


def _call_layer_type(rotary: Any, layer_type: str | None) -> str | None:
    """Return the layer type to call the rotary module with; None if it takes none."""
    typed = "layer_type" in inspect.signature(type(rotary).forward).parameters
    return layer_type if typed and _has_types(rotary) else None


def _has_types(rotary: Any) -> bool:
    base = getattr(rotary, "base", None)
    return None not in base if isinstance(base, dict) else not hasattr(rotary, "inv_freq")


def _num_pairs(rotary: Any, layer_type: str | None) -> int:
    base = getattr(rotary, "base", None)
    if isinstance(base, dict):
        return len(base[layer_type].inv_freq)
    return len(getattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"))


def _state(rotary: Any) -> tuple[Any, ...]:
    """Return a value that changes whenever the module's frequencies may have; compared by identity."""
    # `_version` counts in-place writes, which keep the pointer.
    buffers = tuple((buffer.data_ptr(), buffer._version) for buffer in rotary.buffers())
    return (id(rotary), _Identity(getattr(rotary, "spectrum", None)), buffers)


class _Identity:
    """Comparison by identity that keeps its subject alive, so that no other object can take over its id."""

    def __init__(self, subject: Any) -> None:
        self.subject = subject

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.subject is other.subject

    __hash__ = None  # type: ignore[assignment]
