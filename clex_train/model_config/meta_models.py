"""Models without weights, built from a config on the meta device; those of equal configs can be shared."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from clex_train.utils.errors import ConfigError, first_line

_shared: ContextVar[dict[str, PreTrainedModel] | None] = ContextVar("shared_meta_models", default=None)


@contextmanager
def sharing_meta_models() -> Iterator[None]:
    """Build the model of each architecture once inside: `model_on_meta` returns it to every caller.

    A caller that changes a model must undo the change.
    """
    token = _shared.set(_shared.get() or {})
    try:
        yield
    finally:
        _shared.reset(token)


def model_on_meta(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a model without weights, or return that of `sharing_meta_models`.

    Raises:
        ConfigError: its model type has no causal language model, or none of this config.
    """
    known = _shared.get()
    if known is None:
        return _build_on_meta(config, trust_remote_code)
    facts = json.dumps(config.to_dict(), sort_keys=True, default=str)
    key = f"{type(config).__qualname__} {trust_remote_code} {facts}"
    if key not in known:
        # Copy: a model keeps its config, and callers change theirs later, for example its vocabulary.
        known[key] = _build_on_meta(copy.deepcopy(config), trust_remote_code)
    return known[key]


def _build_on_meta(config: PretrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    try:
        # No weights are allocated, so an architecture of any size fits.
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a family's own code raises any type for impossible sizes
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            # Followed by the names of every class that is known.
            reason = "transformers has none for it under AutoModelForCausalLM; use a family that it has"
        raise ConfigError(
            "model_type", config.model_type, f"cannot build a causal language model ({reason})"
        ) from error
