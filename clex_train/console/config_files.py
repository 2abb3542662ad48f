"""YAML files of a composed configuration: line numbers of keys, and texts that YAML converted to numbers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from clex_train.console.overrides import type_at
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import read_regular
from clex_train.utils.locations import CONF
from clex_train.utils.records import require_bounded

GLOBAL = "# @package _global_"


def line_of(file: Path, key: str) -> int:
    """Return the line, from 1, of a dotted key of the whole configuration; 0 if it is not in the file."""
    return next((node.start_mark.line + 1 for path, node in _leaves(file) if path == key), 0)


def require_texts(schema: type | None, hydra: Any) -> None:
    """Raise `ConfigError` for a text without quotes that YAML converted, in a file that `hydra` composed."""
    for file in _chosen(hydra):
        loaded = OmegaConf.to_container(OmegaConf.load(file))
        prefix = _package(file)
        for key, node in _leaves(file):
            if type_at(schema, key) is not str:
                continue
            value = _value(loaded, key.removeprefix(prefix).split("."))
            if value is not None and str(value) != node.value and not isinstance(value, str):
                raise ConfigError(
                    f"{shown(file)}, line {node.start_mark.line + 1}",
                    None,
                    f'{key}: YAML reads {node.value} as {value}; write "{node.value}"',
                )


def require_few_values(arguments: Sequence[str]) -> None:
    """Raise `BadFile` for a file of a few hundred bytes whose aliases expand to millions of values.

    Hydra would expand them all. Checks the program's own `conf/` and the folders that `arguments` name.
    """
    named = re.findall(r"(?:^|\s)(?:--config-dir|-cd|--config-path|-cp)[= ](\S+)", " ".join(arguments))
    named += re.findall(r"file://([^,\]'\"\s]+)", " ".join(arguments))
    for folder in [CONF, *map(Path, named)]:
        for file in (*folder.glob("*.yaml"), *folder.glob("*/*.yaml")):
            content = read_regular(file)
            if b"&" in content:
                # Hydra reports other faults itself.
                with suppress(yaml.YAMLError, UnicodeDecodeError):
                    require_bounded(content.decode("utf-8"), file)


def shown(file: Path) -> str:
    """Return a file's path relative to the current folder if it is below it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _chosen(hydra: Any) -> Iterator[Path]:
    """Yield the files of the primary configuration and of each group's option, and those named without a group."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    names = [str(hydra.job.config_name), *(f"{group}/{name}" for group, name in hydra.runtime.choices.items())]
    seen = set[Path]()
    while names:
        name = names.pop(0)
        file = next((found for folder in folders if (found := folder / f"{name}.yaml").is_file()), None)
        if file is None or file in seen:
            continue
        seen.add(file)
        yield file
        group = name.rpartition("/")[0]
        names += [f"{group}/{item}" for item in _defaults(file) if isinstance(item, str) and item != "_self_"]


def _defaults(file: Path) -> list[Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file))
    return list(loaded.get("defaults") or []) if isinstance(loaded, dict) else []


def _package(file: Path) -> str:
    """Return the prefix of a file's own keys: empty, or the folder's name and a dot."""
    lines = file.read_text(encoding="utf-8").splitlines()
    whole = GLOBAL in (line.strip() for line in lines) or (file.parent / "config.yaml").is_file()
    return "" if whole else f"{file.parent.name}."


def _leaves(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield every key of the file, dotted and with its package, and the node of its value, mappings and lists too."""
    root = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    yield from _below(root, _package(file))


def _below(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    pairs = list[tuple[Any, Any]]()
    if isinstance(node, yaml.MappingNode):
        pairs = [(key.value, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        pairs = list(enumerate(node.value))
    for key, value in pairs:
        name = f"{prefix}{key}"
        yield name, value
        yield from _below(value, f"{name}.")


def _value(loaded: Any, path: list[str]) -> Any:
    """Return the value at a path of keys, which YAML may have converted; None if it is missing or not a scalar."""
    for part in path:
        items = loaded.items() if isinstance(loaded, Mapping) else enumerate(loaded) if isinstance(loaded, list) else ()
        loaded = next((value for key, value in items if str(key) == part), None)
    return None if isinstance(loaded, (dict, list)) else loaded
