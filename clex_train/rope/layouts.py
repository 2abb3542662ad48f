"""Pairing of the components of a rotated key, measured on the functions by which a family rotates.

    f(key, theta_2) = R(theta_2 - theta_1) f(key, theta_1)

This must hold for R in one of `LAYOUTS`, whatever order `f` leaves the components in: DeepSeek's rotation takes pairs
(2j, 2j + 1) and puts them at j and j + d/2. Shapes: `S` sequence, `P` pairs = d / 2.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.scaling.spectrum import LAYOUTS, Rotation, Spectrum, cos_sin

Expand = Callable[[Tensor], Tensor]

ROTATIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb")
"""Functions of transformers that rotate queries and keys."""


def key_layout(module: nn.Module, spectrum: Spectrum, expand: Expand, is_complex: bool) -> str | None:
    """Return the layout in which the family's own functions leave a rotated key; None if none does, or they differ.

    `expand` arranges P angles as the functions expect cos and sin; `is_complex` is True where they take cos + i sin.
    """
    source = vars(sys.modules[type(module).__module__])
    found = {_layout_of(source[name], spectrum, expand, is_complex) for name in ROTATIONS if name in source}
    return found.pop() if len(found) == 1 else None


def _layout_of(function: Callable[..., Any], spectrum: Spectrum, expand: Expand, is_complex: bool) -> str | None:
    """Return the layout in which a rotation by the change of theta takes what `function` rotated to another theta."""
    rotate_by = _as_rotation(function, expand, is_complex)
    if rotate_by is None:
        return None
    # All components differ, so a wrong pairing cannot agree by accident. As many heads as positions: families put
    # either first.
    key, positions = torch.linspace(-1, 1, 32 * len(spectrum.inv_freq)).view(1, 4, 4, -1), torch.arange(4)[None]
    theta = spectrum.inv_freq
    before, after = (rotate_by(key, *cos_sin(positions, scale * theta)) for scale in (1.0, 1.5))
    cos, sin = cos_sin(positions, 0.5 * theta)
    for name, rotate in LAYOUTS.items():
        for heads in (1, 2):
            if torch.allclose(rotate(before, cos.unsqueeze(heads), sin.unsqueeze(heads)), after, atol=1e-5):
                return name
    return None


def _as_rotation(function: Callable[..., Any], expand: Expand, is_complex: bool) -> Rotation | None:
    """Return (key, cos [1, S, P], sin) -> rotated key of a family's function; None for unknown parameters."""
    names = list(inspect.signature(function).parameters)
    if is_complex:
        is_known = len(names) == 3
        return (lambda key, cos, sin: function(key, key, torch.complex(cos, sin))[1]) if is_known else None
    if names[:4] == ["q", "k", "cos", "sin"]:
        return lambda key, cos, sin: function(key, key, expand(cos), expand(sin))[1]
    if names[:3] == ["x", "cos", "sin"]:
        return lambda key, cos, sin: function(key, expand(cos), expand(sin))
    return None
