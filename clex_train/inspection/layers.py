"""Layers of a model: which RoPE rotates their keys, and how far back they see.

Each attention layer is tried on the meta device (`attention.layer_probe`), so no model family is named.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from clex_train.attention import layer_probe
from clex_train.inspection.spectra import LayerRope


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    index: int
    rope: str | None
    """Layer type of its RoPE; None if all layers share one."""
    rotates: bool | None
    """True if RoPE turns its keys; None if the trial failed."""
    window: int | None
    """Most tokens that it sees; None for all of them."""
    has_attention: bool = True
    """False for a layer without attention by position, such as linear attention or a state-space model."""

    @property
    def kind(self) -> str:
        """Describe the layer in words."""
        if not self.has_attention:
            return "no attention with positions"
        named = f"RoPE of {self.rope}" if self.rope else "RoPE"
        rotation = {True: named, False: "no RoPE", None: f"{named}, as far as is known"}[self.rotates]
        return f"{rotation}, {f'window of {self.window:,} tokens' if self.window else 'full attention'}"


def read(model: nn.Module, ropes: Sequence[LayerRope]) -> tuple[Layer, ...]:
    """Read the layers of a model on the meta device, in order."""
    modules = layer_probe.rotary_attention(model)
    widths = {rope.name: rope.width for rope in ropes}
    config: Any = getattr(model, "config", None)

    def cos_shape(module: Any) -> tuple[int, ...] | None:
        width = widths.get(_rope_name(module, widths))
        return None if width is None else (1, 2, width)

    is_complex = any(rope.is_complex for rope in ropes)
    probes = layer_probe.probe_layers(modules, cos_shape, config, is_complex)
    found = {
        module.layer_idx: Layer(
            index=module.layer_idx,
            rope=_rope_name(module, widths),
            rotates=trial.rotates,
            window=layer_probe.layer_window(module),
        )
        for module, trial in zip(modules, probes, strict=True)
    }
    # The decoder may be a part of a larger model, whose config has the number of its layers one level down.
    count = max([config.get_text_config().num_hidden_layers, *(index + 1 for index in found)])
    return tuple(found.get(index) or Layer(index, None, False, None, has_attention=False) for index in range(count))


def grouped(layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    """Yield each kind of layer with the indices of its layers, such as `0-4, 6-10`."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    for kind in kinds:
        yield ranges([layer.index for layer in layers if layer.kind == kind]), kind


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as ranges: `0-4, 7`, or `3, 7, ..., 31` for equal steps."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _rope_name(module: Any, widths: dict[str | None, int | None]) -> str | None:
    kind = layer_probe.layer_type(module)
    return kind if kind in widths else None
