"""KV caches in the calls and outputs of Hugging Face models, found by type.

transformers called the parameter `past_key_values` up to 5.23 and `cache` from 5.24 on, and modules inside a model use
other names. An instance of transformers' `Cache` is recognized under any name.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from clex_train.utils import versions
from clex_train.utils.errors import ConfigError

UNANNOTATED_NAMES = ("cache", "past_key_values")
"""Parameter names of a cache in model code that has no type annotations."""


class LibraryChanged(RuntimeError):
    """A library no longer behaves as this project relies on; the message names the versions. Not a user's mistake."""

    def __init__(self, found: str, name: str = "transformers") -> None:
        super().__init__(f"{found}; {versions.describe(name)}")


def find_in_call(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Cache | None:
    """Find the cache among the arguments of a call, positional or keyword; None for a call without one."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def find_in_output(output: Any) -> Cache | None:
    """Find the cache in a model's output: a tuple, a `ModelOutput` or another object with attributes."""
    # `ModelOutput` is an OrderedDict, so this test comes before the generic one.
    if isinstance(output, Mapping):
        parts: Iterable[Any] = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    else:
        parts = getattr(output, "__dict__", {}).values()
    return find_in_call(parts, {})


def require_in_output(output: Any) -> Cache:
    """Return the cache in the output of a call with `use_cache=True`; `LibraryChanged` when there is none."""
    cache = find_in_output(output)
    if cache is None:
        raise LibraryChanged(f"use_cache=True: {type(output).__name__} holds no KV cache")
    return cache


def as_kwargs(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Build the keyword arguments that pass `cache` to `model`; empty without a cache."""
    return {} if cache is None else {parameter_name(model): cache}


def parameter_name(model: nn.Module) -> str:
    """Name the parameter by which `model.forward` takes a cache; `ConfigError` names a model type that takes none."""
    name = _parameter(model)
    if name is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ConfigError("model_type", kind, f"its forward takes no KV cache ({versions.describe('transformers')})")
    return name


def accepts_keys(model: nn.Module) -> bool:
    """Return True if `model` takes a cache that holds keys; a recurrent state alone does not count."""
    if _parameter(model) is None:
        return False
    # Mamba and the like take a cache too, so the parameter proves nothing; the layers that the config yields do.
    return any(isinstance(layer, CacheLayerMixin) for layer in DynamicCache(config=model.config).layers)


def require_found(given: Cache | None, output: Any, num_new: int) -> None:
    """Raise `LibraryChanged` when a call of `num_new` tokens used a cache that was not found among its arguments."""
    # A cache that the model created itself holds the new tokens alone.
    cache = find_in_output(output) if given is None else None
    # Continuing silently would use positions and a t for the wrong length.
    if cache is not None and cache.get_seq_length() > num_new:
        raise LibraryChanged(
            f"a call of {num_new} tokens returned a KV cache of {int(cache.get_seq_length())}, but none was found in "
            "its arguments"
        )


def _parameter(model: nn.Module) -> str | None:
    """Find the parameter by annotation or by name, through wrappers such as a DeepSpeed engine."""
    # An engine's forward is (*inputs, **kwargs); the wrapped model, under `module`, has the signature.
    name, inner = _cached_parameter(type(model).forward), getattr(model, "module", None)
    return _parameter(inner) if name is None and isinstance(inner, nn.Module) else name


@functools.cache
def _cached_parameter(forward: Callable[..., Any]) -> str | None:
    """Read the signature of a forward method once per class."""
    # `inspect.signature` takes tens of microseconds, and every decoding step needs the answer.
    parameters = inspect.signature(forward).parameters
    # Annotations may be strings or unions (`Cache | None`), so match on the text.
    typed = [name for name, each in parameters.items() if "Cache" in str(each.annotation)]
    named = [name for name in UNANNOTATED_NAMES if name in parameters]
    return next(iter([*typed, *named]), None)
