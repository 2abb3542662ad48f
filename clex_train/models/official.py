"""A directory in the layout of the original CLEX code as a stock Hugging Face model and a vector field.

    config.json     rope_scaling = {"type": "clex", "max_factor", "param_factor", "act", ...}, log_scale, rope_theta
    weights         those of the stock model, and <body>.clex_layer.* (see `scaling.official`)

Stock transformers refuses that rope type and knows no such weights, so both are taken out before it looks.
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
# What the original code wrote into config.json and stock transformers would refuse or misread.
OFFICIAL_KEYS = ("rope_scaling", "log_scale", "use_flashattn", "auto_map", "transformers_version")
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True)
class OfficialField:
    """What a directory of the original code says beside the weights of the stock model."""

    clex: Clex
    context_len: int
    log_scale: str
    """Policy of `attention.log_scaling`: `official` when the checkpoint was made for log-scaling, else `off`."""


def is_official(directory: Path) -> bool:
    """Whether `config.json` asks for the original CLEX code."""
    path = directory / "config.json"
    return path.is_file() and _is_clex(_read_json(path))


def read_official_config(directory: Path) -> PretrainedConfig:
    """The architecture as stock transformers knows it, without what only the original code understands."""
    return _stock_config(_read_facts(directory))


def log_scale_policy(directory: Path) -> str:
    """`official` when the checkpoint was made for log-scaling, else `off`; read from `config.json` alone."""
    return "official" if _read_facts(directory).get("log_scale") else "off"


def max_factor(directory: Path) -> float | None:
    """t_max of the checkpoint, read from `config.json` alone; None where that does not say it."""
    value = _read_facts(directory)["rope_scaling"].get("max_factor")
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(directory / "config.json", None, f"max_factor={value}: not a number") from error


def asks_for_clex(config: PretrainedConfig) -> bool:
    """Whether transformers has read an architecture, such as one of the hub, that only the original code can run."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return "clex" in (parameters.get("type"), parameters.get("rope_type"))


def load_official_model(
    directory: Path, dtype: torch.dtype | str = torch.float32, **from_pretrained: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the stock model of a directory of the original code, with transformers' loading info of other tensors.

    Further arguments go to `from_pretrained`.
    """
    options = {"config": read_official_config(directory), "dtype": dtype, **from_pretrained}
    with _without_report():
        model, report = AutoModelForCausalLM.from_pretrained(directory, **options | {"output_loading_info": True})
    report["unexpected_keys"] = {name for name in report["unexpected_keys"] if CLEX_LAYER not in name}
    return model, report


def read_official_field(directory: Path, inv_freq: Float64[Tensor, " P"], tolerance: float = 1e-6) -> OfficialField:
    """The vector field of a directory of the original code, on the frequencies `inv_freq` of its stock model.

    The quirks of the format (base 10000 inside the field, log-scaling below L) are switched on. `ValueError` names the
    directory and the tensor, or both numbers where the field does not fit the model.
    """
    facts = _read_facts(directory)
    try:
        clex = clex_from_official(dict(_clex_tensors(directory)), facts["rope_scaling"], inv_freq, tolerance)
    except Exception as error:  # whatever tensors or numbers that are not a field's make torch and its readers raise
        raise ConfigError(directory, None, first_line(error)) from error
    return OfficialField(clex, int(facts["max_position_embeddings"]), log_scale_policy(directory))


def official_config(config: PretrainedConfig, clex: Clex, context_len: int, log_scale: bool) -> dict[str, Any]:
    """`config.json` of a directory that the original code reads, for a stock model with `clex`.

    `ValueError` when the field starts from other frequencies than rope_theta alone gives: the format knows no others.
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
        # The versions of transformers that the original code runs on know the type of the weights by this name.
        "torch_dtype": facts.get("dtype"),
    }


def _require_plain_start(clex: Clex, theta: float, rope_type: str) -> None:
    pairs = torch.arange(len(clex.base_inv_freq), dtype=torch.float64)
    if not torch.allclose(clex.base_inv_freq.cpu(), theta ** (-pairs / len(pairs)), rtol=1e-5, atol=0):
        raise ConfigError(
            "rope_type",
            rope_type,
            f"the official layout starts from rope_theta={theta:g} alone, and this model from "
            "frequencies that another scaling made; keep it in this project's layout",
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
        raise ConfigError(path, None, "max_position_embeddings is missing, the context that the base was trained on")
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
