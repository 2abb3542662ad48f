"""Directories with nothing but a config.json, which is all that an inspection reads."""

import json
from pathlib import Path
from typing import Any

from clex_train.config.model import ModelConfig
from clex_train.inspection import inspect_model
from clex_train.inspection.engines.verdict import Verdict
from clex_train.inspection.reading import Reading

CONTEXT, PAIRS, THETA = 256, 8, 10_000.0
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
HARSH = [26.0, 0.5, 3.0, 1.0, 7.5, 2.0, 11.0, 1.5]
"""Factors in no order, so that a reversed or shifted list shows."""


def save_config(folder: Path, model_type: str = "llama", tokenizer_len: int | None = None, **facts: Any) -> Path:
    """Write config.json with `facts` as they are, None for a key to leave out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, **SMALL, **facts}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if tokenizer_len is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": tokenizer_len}))
    return folder


def scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a type, with the base of the small models."""
    return {"rope_type": rope_type, "rope_theta": THETA, **parameters}


def longrope(original: int, **parameters: Any) -> dict[str, Any]:
    """Return `rope_parameters` of a longrope with two equal harsh lists."""
    lists = {"short_factor": HARSH, "long_factor": HARSH}
    return scaled("longrope", **{**lists, "original_max_position_embeddings": original, **parameters})


def inspect(folder: Path, length: int | None = None, **model: Any) -> Reading:
    """Inspect a directory."""
    return inspect_model.inspect(ModelConfig(path=str(folder), **model), length)


def verdict(reading: Reading, engine: str) -> Verdict:
    """Return the verdict of one engine."""
    (found,) = (each for each in reading.verdicts if each.engine.split()[0] == engine)
    return found
