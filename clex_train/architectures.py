"""What a model directory or hub name says before its weights are read: architecture, L, and the CLEX field beside it.

Everything that can be wrong with `model.*` is found here, in one line.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from clex_train import model_directory
from clex_train.faults import first_line
from clex_train.rope import official, recipes
from clex_train.rope.patch import require_rotary
from clex_train.scaling.table import FrequencyTable, scale_grid
from clex_train.settings.bounds import require
from clex_train.settings.model import ModelConfig

REPOSITORY = Path(__file__).resolve().parents[1]


def to_train(model: ModelConfig) -> PretrainedConfig:
    """The architecture of `model.path` (or of `model.config` alone).

    `ValueError` in one line if it cannot be read or has no rotary embedding that theta(t) can be put into.
    """
    config = to_read(model)
    require_rotary(config, model.trust_remote_code)
    return config


def to_read(model: ModelConfig) -> PretrainedConfig:
    """The architecture of a model that is only read, which needs no RoPE; `ValueError` if it cannot be read."""
    key, path = ("model.path", model.path) if model.path else ("model.config", _shipped(model.config))
    assert path is not None
    require_directory(key, path)
    try:
        if official.is_official(Path(path)):
            config = official.read_official_config(Path(path))
        else:
            options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
            config = AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}={path}: no readable config.json ({first_line(error)})") from error
    require(
        not official.asks_for_clex(config),
        key,
        path,
        "a checkpoint of the original CLEX code: download it (`hf download`) and give its directory",
    )
    return config


@dataclass(frozen=True)
class ContextLength:
    """L in tokens, and what says so."""

    length: int
    source: str


def context_source(model: ModelConfig, config: PretrainedConfig) -> ContextLength:
    """Return L with its source in words."""
    return ContextLength(context_length(model, config), "model.context_len" if model.context_len else "config.json")


def context_length(model: ModelConfig, config: PretrainedConfig) -> int:
    """L: `model.context_len`, else what an earlier run recorded, else the architecture's own.

    A CLEX run records it in `clex.json`, a recipe by formula as `original_max_position_embeddings`.
    """
    trained_on = _context_of_field(model.path) if model.path else None
    if model.context_len is not None:
        require(
            trained_on in (None, model.context_len),
            "model.context_len",
            model.context_len,
            f"the CLEX of {model.path} belongs to a base of {trained_on} tokens; leave the key out",
        )
        return model.context_len
    if trained_on is not None:
        return trained_on
    length = recipes.original_context(config) or _own_context(config.get_text_config())
    require(
        length is not None, "model.context_len", None, "the architecture does not say what context it was trained on"
    )
    assert length is not None
    return int(length)


def digest(arch: PretrainedConfig) -> str:
    """A digest of everything in an architecture that shapes its weights or its function, for checkpoints."""
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    # What differs from the defaults, so that a newer transformers with more fields gives the same digest.
    facts = {k: v for k, v in arch.to_diff_dict().items() if k not in ignored}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def has_field(path: str) -> bool:
    """Whether a directory holds a CLEX field, in this project's layout or the official one."""
    return model_directory.has_clex(Path(path)) or official.is_official(Path(path))


def t_max_of_field(path: str) -> float | None:
    """t_max of the field in a directory, without reading weights; None when there is no field or it does not say."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).t_max
    return official.max_factor(directory) if official.is_official(directory) else None


def grid_of_field(path: str) -> Tensor | None:
    """The scale factors [K] that the field in a directory is read at; None when there is no field or it does not say.

    A field of the original code is solved at the integers.
    """
    directory = Path(path)
    if model_directory.has_clex(directory):
        return FrequencyTable.load(directory / model_directory.TABLE).t
    t_max = t_max_of_field(path)
    return scale_grid(t_max) if t_max else None


def require_directory(key: str, path: str) -> None:
    """Refuse what looks like a local path and is none; a name such as `meta-llama/Llama-2-7b-hf` is left to the hub."""
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    require(
        not local or Path(path).is_dir(),
        key,
        path,
        "no such directory; give a model directory or a hub name owner/model",
    )


def _shipped(path: str | None) -> str | None:
    """A relative `model.config` is looked up from here, then from this repository, so that runs start anywhere."""
    if path is None or Path(path).exists() or not (REPOSITORY / path).is_dir():
        return path
    return str(REPOSITORY / path)


def _own_context(config: Any) -> int | None:
    """What the architecture says it was trained on; longrope begins at its original length."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings")
    # MPT and Bloom have no table of positions, and call it otherwise.
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


def _context_of_field(path: str) -> int | None:
    """L of the CLEX that is in a directory; None for one without."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).context_len
    if official.is_official(directory):
        return int(official.read_official_config(directory).max_position_embeddings)
    return None
