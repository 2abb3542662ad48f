"""Directories of the original CLEX code, read as a stock Hugging Face model plus a vector field.

    config.json     rope_scaling = {"type": "clex", "max_factor", "param_factor", "act", ...}, log_scale, rope_theta
    weights         those of the stock model, and <body>.clex_layer.* (see `models.official_field`)

Stock transformers refuses that rope type and does not know those weights, so both are removed before it reads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from clex_train.models.official_field import clex_from_official, official_rope_scaling
from clex_train.scaling.clex import Clex
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile
from clex_train.utils.records import read_json

CLEX_LAYER = "clex_layer."
# Keys that the original code wrote into config.json and that stock transformers refuses or misreads.
OFFICIAL_KEYS = ("rope_scaling", "log_scale", "use_flashattn", "auto_map", "transformers_version")
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True)
class OfficialField:
    """CLEX field and its settings from a directory of the original code."""

    clex: Clex
    context_len: int
    """L in tokens."""
    log_scale: str
    """Policy of `attention.log_scaling`: `official` if the checkpoint was trained with log-scaling, else `off`."""


def is_official(directory: Path) -> bool:
    """Return True if `config.json` requires the original CLEX code."""
    path = directory / "config.json"
    return path.is_file() and _is_clex(_read_json(path))


def read_official_config(directory: Path) -> PretrainedConfig:
    """Read the architecture for stock transformers, without the keys of the original code."""
    return _stock_config(_read_facts(directory))


def log_scale_policy(directory: Path) -> str:
    """Return `official` if the checkpoint was trained with log-scaling, else `off`; reads `config.json` only."""
    return "official" if _read_facts(directory).get("log_scale") else "off"


def max_factor(directory: Path) -> float | None:
    """Return t_max of the checkpoint from `config.json` alone, or None if it is not there."""
    value = _read_facts(directory)["rope_scaling"].get("max_factor")
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(directory / "config.json", None, f"max_factor={value}: not a number") from error


def requires_official_code(config: PretrainedConfig) -> bool:
    """Return True if a config that transformers has read, for example from the hub, needs the original code."""
    # Older files have `type`, newer ones `rope_type`; transformers keeps either.
    parameters = getattr(config, "rope_parameters", None) or {}
    return "clex" in (parameters.get("type"), parameters.get("rope_type"))


def load_official_model(
    directory: Path, dtype: torch.dtype | str = torch.float32, **from_pretrained: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the stock model of an original CLEX directory; also return transformers' loading info.

    Further arguments go to `from_pretrained`.
    """
    options = {"config": read_official_config(directory), "dtype": dtype, **from_pretrained}
    with _without_report():
        model, report = AutoModelForCausalLM.from_pretrained(directory, **options | {"output_loading_info": True})
    # The field's tensors are expected, only not by transformers.
    report["unexpected_keys"] = {name for name in report["unexpected_keys"] if CLEX_LAYER not in name}
    return model, report


def read_official_field(directory: Path, inv_freq: Float64[Tensor, " P"], tolerance: float = 1e-6) -> OfficialField:
    """Read the vector field of an original CLEX directory, for the frequencies `inv_freq` [P] of its stock model.

    Enables the quirks of the format: base 10000 inside the field, and log-scaling below L too. Raises `ConfigError`,
    naming the directory and the tensor, for a damaged field or one that does not fit the model.
    """
    facts = _read_facts(directory)
    try:
        clex = clex_from_official(dict(_clex_tensors(directory)), facts["rope_scaling"], inv_freq, tolerance)
    except Exception as error:  # torch and its readers raise many types for tensors that do not form a field
        raise ConfigError(directory, None, first_line(error)) from error
    return OfficialField(clex, int(facts["max_position_embeddings"]), log_scale_policy(directory))


def official_config(config: PretrainedConfig, clex: Clex, context_len: int, log_scale: bool) -> dict[str, Any]:
    """Build the `config.json` with which the original code reads a stock model with the field `clex`.

    Raises `ConfigError` when the field does not start from the frequencies of rope_theta: the format has no others.
    """
    facts: dict[str, Any] = config.to_dict()
    rope = facts.pop("rope_parameters", None) or {}
    theta = float(rope.get("rope_theta", 10000.0))
    _require_plain_start(clex, theta, str(rope.get("rope_type")))
    partial = {key: rope[_PARTIAL] for key in (_PARTIAL, "rotary_pct") if _PARTIAL in rope}
    return facts | {
        **partial,
        "rope_theta": theta,
        "rope_scaling": official_rope_scaling(clex),
        "log_scale": log_scale,
        "max_position_embeddings": context_len,
        # The original code runs on versions of transformers that predate the name `dtype`.
        "torch_dtype": facts.get("dtype"),
    }


def _require_plain_start(clex: Clex, theta: float, rope_type: str) -> None:
    pairs = torch.arange(len(clex.base_inv_freq), dtype=torch.float64)
    if not torch.allclose(clex.base_inv_freq.cpu(), theta ** (-pairs / len(pairs)), rtol=1e-5, atol=0):
        raise ConfigError(
            "rope_type",
            rope_type,
            f"the official layout starts from rope_theta={theta:g} alone, but this model's "
            "frequencies come from another scaling; keep it in this project's layout",
        )


def _is_clex(facts: dict[str, Any]) -> bool:
    scaling = facts.get("rope_scaling")
    return isinstance(scaling, dict) and "clex" in (scaling.get("type"), scaling.get("rope_type"))


def _read_facts(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    facts = _read_json(path)
    if not _is_clex(facts):
        raise ConfigError(path, None, f'rope_scaling={facts.get("rope_scaling")}: "type": "clex" is expected')
    if "max_position_embeddings" not in facts:
        raise ConfigError(path, None, "max_position_embeddings, the context of the base model, is missing")
    return facts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = read_json(path)
    except (FileNotFoundError, BadFile) as error:
        raise ConfigError(path, None, f"not a readable config ({error})") from error
    return facts if isinstance(facts, dict) else {}


def _stock_config(facts: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**{key: value for key, value in facts.items() if key not in OFFICIAL_KEYS})


def _clex_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under `clex_layer` in the weight files, by name."""
    # One tensor at a time: `load_file` would read all weights for three small tensors.
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((key, file.get_tensor(key)) for key in file.keys() if CLEX_LAYER in key)  # noqa: SIM118
    for path in sorted(directory.glob("pytorch_model*.bin")):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        yield from ((key, tensor) for key, tensor in tensors.items() if CLEX_LAYER in key)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' warning that the field's tensors are unexpected weights."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
