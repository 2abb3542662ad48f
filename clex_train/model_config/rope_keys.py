"""The RoPE of a config.json as values of its keys: read from one config, written into the copy of another."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

ROPE_KEYS = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings")
"""Keys of config.json that differ between the base model and the model at one t."""


def rope_of(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values of `ROPE_KEYS` that a config has."""
    text = config.get_text_config()
    return {key: copy.deepcopy(getattr(text, key)) for key in ROPE_KEYS if hasattr(text, key)}


def set_rope(config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
    """Return a copy of a config with these values of `ROPE_KEYS`, and without those that are not among them."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for key in ROPE_KEYS:
        if key in values:
            setattr(text, key, copy.deepcopy(values[key]))
        elif key in vars(text):
            delattr(text, key)
    return changed
