"""Find the KV cache in a call and in its output by what it is, and pass one in under the name that the model gives it.

transformers called the parameter `past_key_values` up to 5.23 and calls it `cache` from 5.24 on, and modules inside a
model use names of their own. An instance of transformers' `Cache` is one under any name.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from clex_train.utils import versions

UNANNOTATED_NAMES = ("cache", "past_key_values")
"""Names under which models whose code has no type annotations take a cache."""


class LibraryChanged(RuntimeError):
    """A library no longer does what this project builds on; the message names the versions. Not the user's mistake."""

    def __init__(self, found: str, name: str = "transformers") -> None:
        super().__init__(f"{found}; {versions.describe(name)}")


def find_in_call(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """Find the cache among the arguments of a call, wherever it stands; None for a call without one."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def find_in_output(output: Any) -> Cache | None:
    """Find the cache in the output of a model: a tuple, a `ModelOutput` or another object with attributes."""
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    else:
        parts = getattr(output, "__dict__", {}).values()
    return find_in_call(parts, {})


def require_in_output(output: Any) -> Cache:
    """Take the cache out of the output of a call that asked for one; `LibraryChanged` when there is none."""
    cache = find_in_output(output)
    if cache is None:
        raise LibraryChanged(f"use_cache=True: {type(output).__name__} holds no KV cache")
    return cache


def as_kwargs(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Return keyword arguments that pass `cache` to `model`; without one, none."""
    return {} if cache is None else {parameter_name(model): cache}


def parameter_name(model: nn.Module) -> str:
    """Name the parameter by which `model.forward` takes a cache; `ValueError` names a model type that takes none."""
    name = _parameter(model)
    if name is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(f"model_type={kind}: its forward takes no KV cache ({versions.describe('transformers')})")
    return name


def accepts_keys(model: nn.Module) -> bool:
    """Tell whether `model` takes a cache that holds keys: a recurrent state alone is none."""
    if _parameter(model) is None:
        return False
    return any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def require_found(given: Cache | None, output: Any, num_new: int) -> None:
    """Raise `LibraryChanged` when a call of `num_new` tokens used a cache that was not found among its arguments.

    A cache that the model made itself comes out with the new tokens alone.
    """
    cache = find_in_output(output) if given is None else None
    if cache is not None and cache.get_seq_length() > num_new:
        raise LibraryChanged(
            f"a KV cache of {int(cache.get_seq_length())} tokens came out of a call of {num_new}, and none was found "
            "in its arguments"
        )


def _parameter(model: nn.Module) -> str | None:
    """Find it by type, or by name where a model's code has no types. A wrapper such as an engine has its model's."""
    name, inner = _cached_parameter(type(model).forward), getattr(model, "module", None)
    return _parameter(inner) if name is None and isinstance(inner, nn.Module) else name


@functools.cache
def _cached_parameter(forward: Callable[..., Any]) -> str | None:
    """Read the signature once for a class: every decoding step asks."""
    parameters = inspect.signature(forward).parameters
    typed = [name for name, each in parameters.items() if "Cache" in str(each.annotation)]
    named = [name for name in UNANNOTATED_NAMES if name in parameters]
    return next(iter([*typed, *named]), None)
