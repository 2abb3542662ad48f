"""Read the `config.yaml` of a run folder as data: typed, merged over current defaults, but never interpolated.

OmegaConf would resolve a string such as `${oc.env:HOME}`, so a folder from a stranger could make a program print the
reader's environment. The user's own `conf/` and command line are composed by Hydra and still interpolate.
"""

import re
from pathlib import Path
from typing import Any

import msgspec
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clex_train.config.root import Config
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile
from clex_train.utils.records import decode, read_yaml_mapping

CONFIG, FINAL = "config.yaml", "final"
"""Names in a run folder: the configuration, and the directory of the trained model."""
"""Name of the file, in a run folder and in each of its checkpoints."""
INTERPOLATION = re.compile(r"(\\*)\$\{")
REMEDY = "copy the run folder again, or choose another output_dir"
RESTORE = (
    "the same training command restores it from the newest checkpoint; one of an earlier version has no copy of it: "
    "then restore a backup, or remove the file, and the run resumes unchecked under the configuration that you give"
)


def over_defaults(path: Path) -> dict[str, Any]:
    """Return the recorded values as in the file, merged over current defaults for missing keys.

    Raises:
        ConfigError: the file is missing or damaged, or has a single value in place of a group.
    """
    # Defaults fill keys that a newer version added, so that old run folders still resume.
    defaults = plain(OmegaConf.structured(Config))
    try:
        recorded = read_yaml_mapping(path, within=path.parent)
        if not recorded.keys() & defaults.keys():
            raise BadFile(path, "it has none of its keys")
        return _merged(defaults, recorded, path)
    except FileNotFoundError as error:
        raise ConfigError(path, None, f"missing; {REMEDY}") from error
    except BadFile as error:
        raise ConfigError(
            path, None, f"damaged, cannot be read as a configuration ({error.reason}); {RESTORE}"
        ) from error


def read(path: Path) -> Config:
    """Return the recorded config, checked; raise `ConfigError` as `over_defaults` does, and for an invalid value."""
    recorded = _literal(over_defaults(path))
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(recorded)))
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        # OmegaConf has no common error for values that do not fit a schema.
        raise ConfigError(path, None, f"not the configuration of a run ({first_line(error)}); {REMEDY}") from error
    try:
        # OmegaConf accepts a mapping for an item of any list.
        return decode(msgspec.to_builtins(config), Config, path)
    except BadFile as error:
        raise ConfigError(path, None, f"{error.reason}; {REMEDY}") from error


def plain(node: Any) -> Any:
    """Convert a config to dicts, lists and names of enum members, as in YAML."""
    return OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(node)))


def _merged(defaults: dict[str, Any], recorded: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    merged = dict(defaults)
    for key, value in recorded.items():
        before = defaults.get(key)
        if isinstance(before, dict):
            if not isinstance(value, dict) or not all(isinstance(name, str | int) for name in value):
                raise BadFile(path, f"{prefix}{key}: should be `key: value` lines")
            merged[key] = _merged(before, value, path, f"{prefix}{key}.")
        else:
            merged[key] = value
    return merged


def _literal(value: Any) -> Any:
    """Escape interpolations in every string of nested values, so that OmegaConf returns them unchanged."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value
