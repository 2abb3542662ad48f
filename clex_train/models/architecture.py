"""Architecture of a model directory or hub name, read without its weights: config.json, L, and the CLEX field.

Mistakes in `model.*` are found here and reported in one line.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from clex_train.config.model import Init, ModelConfig
from clex_train.model_config import config_checks
from clex_train.model_config.context_length import ContextLength, context_in_config, stated_length
from clex_train.models import directory as model_directory
from clex_train.models import hub, official
from clex_train.rope.patch import require_rotary
from clex_train.scaling.frequency_table import TABLE, FrequencyTable, scale_grid
from clex_train.utils import locations, log
from clex_train.utils.errors import ConfigError, InputError, require

logger = log.get(__name__)


def to_train(model: ModelConfig) -> PretrainedConfig:
    """Read the architecture of a model to train: `model.path`, or `model.config` alone.

    Raises `ConfigError` when it cannot be read, or has no rotary embedding that theta(t) can replace.
    """
    config = to_read(model)
    require_rotary(config, model.trust_remote_code)
    return config


def to_read(model: ModelConfig) -> PretrainedConfig:
    """Read the architecture of a model to evaluate, which needs no RoPE. Raises `ConfigError` if it cannot be read."""
    key, path = ("model.path", model.path) if model.path else ("model.config", _shipped(model.config))
    assert path is not None
    require_directory(key, path)
    _require_meant(model)
    try:
        if official.is_official(Path(path)):
            config = official.read_official_config(Path(path))
        elif (facts := model_directory.restored_facts(Path(path))) is not None:
            config = _from_facts(facts, path, model.trust_remote_code)
        else:
            options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
            config = AutoConfig.from_pretrained(path, **options, **hub.options(path))
    except Exception as error:  # transformers raises anything from KeyError to its own types for a bad config.json
        raise ConfigError(key, path, f"no readable config.json ({hub.why_not_read(path, error)})") from error
    require(
        not official.requires_official_code(config),
        key,
        path,
        "a checkpoint of the original CLEX code: download it (`hf download`) and give its directory",
    )
    config = model_directory.with_base_rope(Path(path), config)
    # transformers accepts configs, such as zero heads, that fail much later inside the model.
    config_checks.require_valid_rope(config, f"{key}={path}", model.trust_remote_code)
    return config


def _from_facts(facts: dict[str, Any], path: str, trust_remote_code: bool) -> PretrainedConfig:
    """Build the config of `AutoConfig.from_pretrained` from the contents of its file."""
    class_name = facts.get("auto_map", {}).get("AutoConfig")
    if class_name is not None and trust_remote_code:
        config: PretrainedConfig = get_class_from_dynamic_module(class_name, path)(**facts)
    else:
        config = AutoConfig.for_model(**facts)
    config.name_or_path = path
    return config


def _require_meant(model: ModelConfig) -> None:
    """Raise `ConfigError` for random weights with a path that has weights: the user cannot mean both."""
    # Assume that a hub name has weights: checking would take a request.
    has_weights = model.path is not None and (not Path(model.path).is_dir() or model_directory.has_weights(model.path))
    require(
        model.init is not Init.random or not has_weights,
        "model.init",
        "random",
        f"the weights of model.path={model.path} would be ignored; leave model.init out to train them, or set "
        "model.config=DIR model.path=null for random weights of an architecture",
    )


def stand_in(model: ModelConfig) -> ModelConfig:
    """Substitute `model.config` in a dry run for a `model.path` that is not on this machine.

    Raises `ConfigError` when the preset belongs to another model than the path.
    """
    if model.path is None or model.config is None or Path(model.path).is_dir():
        return model
    # `_name_or_path` in a preset's config.json names the model that it describes. A user's own config.json may lack it,
    # and is then accepted.
    shown = _shown(model.config)
    if shown is None or _is_name_of(shown, model.path):
        return dataclasses.replace(model, path=None, init=None)
    require(
        not _is_local(model.path),
        "model.path",
        model.path,
        f"no such directory; for a plan without the model, copy its config.json here and name the directory of that "
        f"by model.config ({model.config} is the architecture of {shown})",
    )
    # A hub name: fetching its own config.json is cheap and exact.
    return dataclasses.replace(model, config=None)


def warn_of_unused_config(model: ModelConfig) -> None:
    """Log that `model.config` is ignored when `model.path` is another model with its own config.json."""
    if model.path is None or model.config is None:
        return
    shown = _shown(model.config) or str(_shipped(model.config))
    if not _is_name_of(shown, model.path):
        logger.info(
            "model.config=%s (the architecture of %s) is not used: model.path=%s has its own config.json",
            model.config,
            shown,
            model.path,
        )


def _is_name_of(shown: str, path: str) -> bool:
    return shown == path or _tail(shown) == _tail(path)


def _shown(config: str) -> str | None:
    """Read the name of the model that an architecture's directory describes, or None."""
    try:
        facts = json.loads((Path(str(_shipped(config))) / "config.json").read_text(encoding="utf-8"))
        name = facts.get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        # `to_read` reports an unreadable config with a better message.
        return None
    return str(name) if name else None


def _tail(path: str) -> tuple[str, ...]:
    """Identify a model by its folder's name, without the path."""
    # Every run ends in `final/`, so include the run's own folder.
    parts = Path(path).parts
    return parts[-2:] if parts[-1:] == ("final",) else parts[-1:]


def context_length(model: ModelConfig, config: PretrainedConfig) -> int:
    """Return L in tokens; see `context_source`."""
    return context_source(model, config).length


def context_source(model: ModelConfig, config: PretrainedConfig) -> ContextLength:
    """Return L and its source: `model.context_len`, else the record of an earlier run, else the architecture.

    Raises `ConfigError` when none of them gives L, or when the key contradicts the record.
    """
    # A CLEX run records L in clex.json, a formula-based method as `original_max_position_embeddings`: after it,
    # max_position_embeddings is the extended length.
    key = f"{model.PREFIX}context_len"
    trained_on = _context_of_field(model.path) if model.path else None
    if model.context_len is not None:
        require(
            trained_on is None or trained_on.length == model.context_len,
            key,
            model.context_len,
            f"the CLEX of {model.path} belongs to a base of {trained_on.length if trained_on else 0} tokens; leave the "
            "key out",
        )
        return ContextLength(model.context_len, key)
    own = trained_on or context_in_config(config, key)
    require(own is not None, key, None, "the architecture does not state its trained context")
    assert own is not None
    return own


def own_context(model: ModelConfig, config: PretrainedConfig) -> int | None:
    """Return L as the model itself gives it, or None where it is absent or ambiguous."""
    try:
        return context_length(dataclasses.replace(model, context_len=None), config)
    except InputError:
        return None


def name(model: ModelConfig) -> str:
    """Name a model for messages: its path, or else the path of its architecture."""
    return str(model.path or model.config)


def embedding_rows(arch: PretrainedConfig) -> int:
    """Return the number of rows of the input embedding, which may exceed the tokenizer's vocabulary."""
    return int(arch.get_text_config().vocab_size)


def digest(arch: PretrainedConfig) -> str:
    """Hash every config field that affects the weights' shapes or the function, for checkpoints."""
    # Fields that vary with the machine, the library or the mode and leave the function alone.
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    # Only differences from the defaults, so that a newer transformers with more fields gives the same digest.
    facts = {k: v for k, v in arch.to_diff_dict().items() if k not in ignored}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def has_field(path: str) -> bool:
    """Return True if a directory has a CLEX field, in this project's layout or the official one."""
    return model_directory.has_clex(Path(path)) or official.is_official(Path(path))


def t_max_of_field(path: str) -> float | None:
    """Read t_max of a directory's CLEX field from its records; None without a field, or if not recorded."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return model_directory.read_record(directory).t_max
    return official.max_factor(directory) if official.is_official(directory) else None


def grid_of_field(path: str) -> Tensor | None:
    """Return the scale factors [K] of a directory's frequency table; None without a field, or if not recorded."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return FrequencyTable.load(directory / TABLE).t
    # The original code stores no table. Its field is solved at the integers, as that code does.
    t_max = t_max_of_field(path)
    return scale_grid(t_max) if t_max else None


def require_directory(key: str, path: str) -> None:
    """Raise `ConfigError` for a missing local directory; a name such as `meta-llama/Llama-2-7b-hf` passes."""
    require(
        not _is_local(path) or Path(path).is_dir(),
        key,
        path,
        "no such directory; give a model directory or a hub name owner/model",
    )


def _is_local(path: str) -> bool:
    """Return True if a path looks like a directory rather than a hub repository."""
    # owner/model is ambiguous; an existing folder named like the owner decides for a (mistyped) local path.
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def _shipped(path: str | None) -> str | None:
    """Resolve a relative `model.config` against the working directory, then against the folder that has `conf/`."""
    # Presets name directories that ship with the package, and a run may start in any folder.
    if path is None or Path(path).exists() or not (locations.ROOT / path).is_dir():
        return path
    return str(locations.ROOT / path)


def _context_of_field(path: str) -> ContextLength | None:
    """Return L of a directory's CLEX field, or None without one."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return ContextLength(model_directory.read_record(directory).context_len, model_directory.CLEX_JSON)
    if official.is_official(directory):
        config = official.read_official_config(directory)
        config.name_or_path = path
        length = stated_length(config, "max_position_embeddings")
        assert length is not None
        return ContextLength(length, "max_position_embeddings of the original CLEX")
    return None
