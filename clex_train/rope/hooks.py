"""Forward pre-hooks that read and change arguments by parameter name.

Families pass the same argument positionally or by keyword; a hook gets (args, kwargs) and must find it in either.
"""

import inspect
from typing import Any, Protocol

from torch import Tensor, nn


class Removable(Protocol):
    """Change of a model that can be taken back."""

    def remove(self) -> None:
        """Take it back."""


class CallArgument:
    """Parameter `name` of `module.forward`, positional or by keyword."""

    def __init__(self, module: nn.Module, name: str) -> None:
        # Read once at installation: hooks run in every layer of every decoding step.
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.name = name
        self.index = parameters.index(name) if name in parameters else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return its value; None when it was not passed."""
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return kwargs.get(self.name)

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's arguments with another value for a parameter that was passed."""
        if self.index is not None and self.index < len(args):
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class CastPositionEmbeddings:
    """Forward pre-hook of a decoder layer that casts cos and sin to the dtype of the hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        self.embeddings = CallArgument(layer, "position_embeddings")
        self.hidden_states = CallArgument(layer, "hidden_states")

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # One cast per layer, not one for all: gradients of cos and sin are then summed over layers in float32.
        pair, hidden = self.embeddings.find(args, kwargs), self.hidden_states.find(args, kwargs)
        if not isinstance(pair, tuple) or not isinstance(hidden, Tensor) or pair[0].dtype == hidden.dtype:
            return None
        return self.embeddings.replace(args, kwargs, tuple(half.to(hidden.dtype) for half in pair))


class SelectPositionEmbeddings:
    """Forward pre-hook of an attention module that picks its layer's pair from those the rotary module returned."""

    def __init__(self, attention: nn.Module, is_local: bool) -> None:
        self.embeddings, self.is_local = CallArgument(attention, "position_embeddings"), is_local

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = self.embeddings.find(args, kwargs)
        if not isinstance(given, tuple):
            return None
        if given[0].is_complex():
            return self.embeddings.replace(args, kwargs, given[1 if self.is_local else 0])
        if len(given) == 2:
            return None
        # Both pairs pass through decoder layers as one tuple, so activation checkpointing recomputes with the same.
        return self.embeddings.replace(args, kwargs, given[2:] if self.is_local else given[:2])


def layers_with_position_embeddings(parent: nn.Module) -> list[nn.Module]:
    """Find the outermost submodules whose forward takes `position_embeddings`: the decoder layers."""
    found: list[nn.Module] = []
    for child in parent.children():
        if "position_embeddings" in inspect.signature(type(child).forward).parameters:
            found.append(child)
        else:
            found += layers_with_position_embeddings(child)
    return found
