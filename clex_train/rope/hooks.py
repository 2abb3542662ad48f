"""Reading and changing what a module's forward is called with, by the names of its parameters.

Families pass the same thing positionally or by keyword; a hook sees (args, kwargs) and must find it in either.
"""

import inspect
from typing import Any

from torch import Tensor, nn


class CallArgument:
    """The parameter `name` of `module.forward`, wherever a caller puts it."""

    def __init__(self, module: nn.Module, name: str) -> None:
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.name = name
        self.index = parameters.index(name) if name in parameters else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its value, None when it was not passed."""
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return kwargs.get(self.name)

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with another value for a parameter that was passed."""
        if self.index is not None and self.index < len(args):
            return (*args[: self.index], value, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, self.name: value}


class CastPositionEmbeddings:
    """Forward pre-hook of a decoder layer: cos and sin in the dtype of its hidden states.

    One cast per layer, not one for all: the gradients of cos and sin are then summed over the layers in float32.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.embeddings = CallArgument(layer, "position_embeddings")
        self.hidden_states = CallArgument(layer, "hidden_states")

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        pair, hidden = self.embeddings.find(args, kwargs), self.hidden_states.find(args, kwargs)
        if not isinstance(pair, tuple) or not isinstance(hidden, Tensor) or pair[0].dtype == hidden.dtype:
            return None
        return self.embeddings.replace(args, kwargs, tuple(half.to(hidden.dtype) for half in pair))


class SelectPositionEmbeddings:
    """Forward pre-hook of an attention module: of both pairs that the rotary module returned, the one of this layer.

    They travel through the decoder layers as one tuple, so that recomputation in the backward pass meets the same.
    """

    def __init__(self, attention: nn.Module, is_local: bool) -> None:
        self.embeddings, self.is_local = CallArgument(attention, "position_embeddings"), is_local

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = self.embeddings.find(args, kwargs)
        if not isinstance(given, tuple) or len(given) == 2:
            return None
        return self.embeddings.replace(args, kwargs, given[2:] if self.is_local else given[:2])


def layers_with_position_embeddings(parent: nn.Module) -> list[nn.Module]:
    """The outermost submodules whose forward takes `position_embeddings`: the decoder layers."""
    found: list[nn.Module] = []
    for child in parent.children():
        if "position_embeddings" in inspect.signature(type(child).forward).parameters:
            found.append(child)
        else:
            found += layers_with_position_embeddings(child)
    return found
