"""What a model directory or hub name says before its weights are read: architecture, L, and the CLEX field beside it.

Everything that can be wrong with `model.*` is found here, in one line.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from clex_train.config.model import Init, ModelConfig
from clex_train.models import directory as model_directory
from clex_train.models import hub, official
from clex_train.rope import config_checks, recipes
from clex_train.rope.patch import require_rotary
from clex_train.rope.recipes import ContextLength
from clex_train.scaling.table import FrequencyTable, scale_grid
from clex_train.utils import log
from clex_train.utils.bounds import require

REPOSITORY = Path(__file__).resolve().parents[2]

logger = log.get(__name__)


def to_train(model: ModelConfig) -> PretrainedConfig:
    """The architecture of `model.path` (or of `model.config` alone).

    `ValueError` in one line if it cannot be read or has no rotary embedding that theta(t) can be put into.
    """
    config = to_read(model)
    require_rotary(config, model.trust_remote_code)
    return config


def to_read(model: ModelConfig) -> PretrainedConfig:
    """Read the architecture of a model that is only read, which needs no RoPE; `ValueError` if it cannot be read."""
    key, path = ("model.path", model.path) if model.path else ("model.config", _shipped(model.config))
    assert path is not None
    require_directory(key, path)
    _require_meant(model)
    try:
        if official.is_official(Path(path)):
            config = official.read_official_config(Path(path))
        else:
            options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
            config = AutoConfig.from_pretrained(path, **options, **hub.options(path))
    except Exception as error:  # whatever a library raises over a config.json, KeyError to its own types, is about it
        raise ValueError(f"{key}={path}: no readable config.json ({hub.why_not_read(path, error)})") from error
    require(
        not official.asks_for_clex(config),
        key,
        path,
        "a checkpoint of the original CLEX code: download it (`hf download`) and give its directory",
    )
    config_checks.require_sensible(config, f"{key}={path}", model.trust_remote_code)
    return config


def _require_meant(model: ModelConfig) -> None:
    """Refuse random weights beside a path that has some: one of the two is not meant."""
    has_weights = model.path is not None and (not Path(model.path).is_dir() or model_directory.has_weights(model.path))
    require(
        model.init is not Init.random or not has_weights,
        "model.init",
        "random",
        f"the weights of model.path={model.path} would be ignored; leave model.init out to train them, or say "
        "model.config=DIR model.path=null for random weights of an architecture",
    )


def stand_in(model: ModelConfig) -> ModelConfig:
    """Let `model.config` stand in, in a dry run, for a `model.path` that is not on this machine.

    A preset names the architecture of one model, and `_name_or_path` in its config.json says which, so that it is not
    taken for that of another path. A user's own config.json without is taken as meant. `ValueError` names both.
    """
    if model.path is None or model.config is None or Path(model.path).is_dir():
        return model
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
    # A hub name: its own config.json is small enough to fetch.
    return dataclasses.replace(model, config=None)


def warn_of_unused_config(model: ModelConfig) -> None:
    """Log that `model.config` has no effect beside a `model.path` of another model, which has its own config.json."""
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
    """Read which model an architecture's directory says that it belongs to."""
    try:
        facts = json.loads((Path(str(_shipped(config))) / "config.json").read_text(encoding="utf-8"))
        name = facts.get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        # For `to_read` to refuse in its own words.
        return None
    return str(name) if name else None


def _tail(path: str) -> tuple[str, ...]:
    """Name a model wherever it lies: by its folder, with the run's for the `final/` of a run."""
    parts = Path(path).parts
    return parts[-2:] if parts[-1:] == ("final",) else parts[-1:]


def context_length(model: ModelConfig, config: PretrainedConfig) -> int:
    """L in tokens; see `context_source`."""
    return context_source(model, config).length


def context_source(model: ModelConfig, config: PretrainedConfig) -> ContextLength:
    """L and where it comes from: `model.context_len`, else what an earlier run recorded, else the architecture's own.

    A CLEX run records it in `clex.json`, a recipe by formula as `original_max_position_embeddings`.
    """
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
    own = trained_on or recipes.own_context(config, key)
    require(own is not None, key, None, "the architecture does not say what context it was trained on")
    assert own is not None
    return own


def own_context(model: ModelConfig, config: PretrainedConfig) -> int | None:
    """L without `model.context_len`; None where the model does not say it, or not clearly."""
    try:
        return context_length(dataclasses.replace(model, context_len=None), config)
    except ValueError:
        return None


def name(model: ModelConfig) -> str:
    """Name a model in messages: by where its weights are, else by where its architecture is."""
    return str(model.path or model.config)


def embedding_rows(arch: PretrainedConfig) -> int:
    """Return the number of ids that the input embedding has a row for."""
    return int(arch.get_text_config().vocab_size)


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
    require(
        not _is_local(path) or Path(path).is_dir(),
        key,
        path,
        "no such directory; give a model directory or a hub name owner/model",
    )


def _is_local(path: str) -> bool:
    """Return True if it looks like a directory rather than the name of a hub repository."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def _shipped(path: str | None) -> str | None:
    """A relative `model.config` is looked up from here, then from this repository, so that runs start anywhere."""
    if path is None or Path(path).exists() or not (REPOSITORY / path).is_dir():
        return path
    return str(REPOSITORY / path)


def _context_of_field(path: str) -> ContextLength | None:
    """L of the CLEX that is in a directory; None for one without."""
    directory = Path(path)
    if model_directory.has_clex(directory):
        return ContextLength(model_directory.read_record(directory).context_len, model_directory.CLEX_JSON)
    if official.is_official(directory):
        config = official.read_official_config(directory)
        config.name_or_path = path
        length = recipes.stated_length(config, "max_position_embeddings")
        assert length is not None
        return ContextLength(length, "max_position_embeddings of the original CLEX")
    return None
