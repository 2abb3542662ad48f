"""A directory in the layout of the original CLEX code as a stock Hugging Face model and a vector field.

    config.json     rope_scaling = {"type": "clex", "max_factor", "param_factor", "act", ...}, log_scale, rope_theta
    weights         those of the stock model, and <body>.clex_layer.* (see `scaling.official`)

Stock transformers refuses that rope type and knows no such weights, so both are taken out before it looks.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clex_train.rope.probe import find_rotary, probe
from clex_train.scaling.clex import Clex
from clex_train.scaling.official import clex_from_official, official_rope_scaling

CLEX_LAYER = "clex_layer."
# What the original code wrote into config.json and stock transformers would refuse or misread.
OFFICIAL_KEYS = ("rope_scaling", "log_scale", "use_flashattn", "auto_map", "transformers_version")


@dataclass
class OfficialCheckpoint:
    """What a directory of the original code holds; `install_rotary` and log-scaling are left to the caller."""

    model: PreTrainedModel
    clex: Clex
    context_len: int
    log_scale: str
    """Policy of `attention.log_scaling`: `official` when the checkpoint was made for log-scaling, else `off`."""


def is_official(directory: Path) -> bool:
    """Whether `config.json` asks for the original CLEX code."""
    path = directory / "config.json"
    return path.is_file() and _is_clex(json.loads(path.read_text(encoding="utf-8")))


def read_official_config(directory: Path) -> PretrainedConfig:
    """The architecture as stock transformers knows it, without what only the original code understands."""
    return _stock_config(_read_facts(directory))


def load_official_model(
    directory: Path, dtype: torch.dtype = torch.float32, **from_pretrained: Any
) -> OfficialCheckpoint:
    """Load a directory of the original code in one call; further arguments go to `from_pretrained`.

    The quirks of the format (base 10000 inside the field, log-scaling below L) are switched on. `ValueError` names the
    file, or both numbers where the field does not fit the model.
    """
    facts = _read_facts(directory)
    config = _stock_config(facts)
    tensors = dict(_clex_tensors(directory))
    with _without_report():
        model = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, **from_pretrained)
    traits = probe(find_rotary(model).module, model.config)
    try:
        clex = clex_from_official(tensors, facts["rope_scaling"], traits.base[traits.scaled].inv_freq)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    log_scale = "official" if facts.get("log_scale") else "off"
    return OfficialCheckpoint(model, clex, int(facts["max_position_embeddings"]), log_scale)


def official_config(config: PretrainedConfig, clex: Clex, context_len: int, log_scale: bool) -> dict[str, Any]:
    """`config.json` of a directory that the original code reads, for a stock model with `clex`."""
    facts = config.to_dict()
    parameters = facts.pop("rope_parameters", None) or {}
    return facts | {
        "rope_theta": parameters.get("rope_theta", 10000.0),
        "rope_scaling": official_rope_scaling(clex),
        "log_scale": log_scale,
        "max_position_embeddings": context_len,
    }


def _is_clex(facts: dict[str, Any]) -> bool:
    scaling = facts.get("rope_scaling") or {}
    return "clex" in (scaling.get("type"), scaling.get("rope_type"))


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable config ({error})") from error
    if not _is_clex(facts):
        raise ValueError(f'{path}: rope_scaling={facts.get("rope_scaling")}: "type": "clex" is expected')
    if "max_position_embeddings" not in facts:
        raise ValueError(f"{path}: max_position_embeddings is missing, the context that the base was trained on")
    return facts


def _stock_config(facts: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**{key: value for key, value in facts.items() if key not in OFFICIAL_KEYS})


def _clex_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under `clex_layer` in the weight files."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((key, file.get_tensor(key)) for key in file.keys() if CLEX_LAYER in key)  # noqa: SIM118
    for path in sorted(directory.glob("pytorch_model*.bin")):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        yield from ((key, tensor) for key, tensor in tensors.items() if CLEX_LAYER in key)


@contextmanager
def _without_report() -> Iterator[None]:
    """transformers would list the field's tensors as unexpected weights."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
