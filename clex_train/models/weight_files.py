"""Read the files of weights by their headers: which tensor is in which file, of what shape and dtype.

A directory is refused in one line where transformers would choose between two tensors of one name, or read other
tensors than its index says.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from clex_train.models.directory import WEIGHT_FILES
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile, is_inside, is_lfs_pointer, require_regular
from clex_train.utils.records import read_record

NAMED = 3
ROWS = 4096
"""Rows of two tensors that are compared at a time: 64 MiB of an embedding of width 4096 in fp32."""
OTHER_LAYOUTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack")
OBJECTS = "Unsupported global"
"""In torch's message about a pickle of more than tensors."""


class NotThere(ConfigError):
    """A weight file that the directory should have is absent."""


@dataclass(frozen=True)
class Stored:
    """All tensors of a directory, on the meta device, and the file of each."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Index:
    """The part of `model.safetensors.index.json` that is read here."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def files(directory: Path, or_else: str = "") -> list[Path]:
    """List the weight files that transformers would read; `ValueError` when there are none or one is not there.

    `or_else` is another remedy where there are none.
    """
    chosen = _chosen(directory)
    if chosen is None:
        raise NotThere("model.path", directory, f"{_no_weights(directory)}{or_else}")
    if chosen.suffix != ".json":
        return [chosen]
    names = sorted(set(_read_index(chosen).weight_map.values()))
    absent = [name for name in names if not (directory / name).exists()]
    if absent:
        raise NotThere(
            "model.path", directory, f"{chosen.name} names {named(absent, 'file')}, not there; copy the directory again"
        )
    return [directory / name for name in names]


def read_headers(directory: Path, or_else: str = "") -> Stored:
    """Read which tensors a directory holds; `ValueError` names a tensor that is in two files or not where indexed."""
    found = Stored()
    for path in files(directory, or_else):
        tensors = header(path)
        if twice := sorted(tensors.keys() & found.places.keys()):
            raise ConfigError(
                "model.path",
                directory,
                f"{named(twice)} in both {found.places[twice[0]].name} and {path.name}, and "
                "only one of them would be used; keep the shards of one save and copy the directory again",
            )
        found.tensors.update(tensors)
        found.places.update(dict.fromkeys(tensors, path))
    _require_as_indexed(directory, found.places)
    return found


def header(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a file by name, on the meta device; `ValueError` names a file that is not whole."""
    _require_content(path)
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path, map_location="meta")
        tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # whatever a damaged archive makes zipfile, pickle and torch raise
        if OBJECTS in str(error):
            raise ConfigError(
                path,
                None,
                "it holds Python objects beside tensors, as a trainer's checkpoint does, and they are not "
                "loaded; give a directory that save_pretrained writes",
            ) from error
        reason = first_line(error)
        raise ConfigError(
            path, None, f"not readable weights, cut short or damaged ({reason}); copy it again"
        ) from error
    _require_flat(path, content)
    return tensors


def have_equal_values(stored: Stored, first: str, second: str) -> bool:
    """Compare the contents of two tensors of one shape, some rows at a time."""
    pieces = zip(*(_pieces(stored.places[name], name) for name in (first, second)), strict=True)
    # A number that is not finite is refused by its own name elsewhere.
    return all(torch.equal(a.double().nan_to_num(), b.double().nan_to_num()) for a, b in pieces)


def named(names: list[str], what: str = "tensor") -> str:
    """Count names and show the first few."""
    shown = ", ".join(names[:NAMED])
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({shown}{more})"


def _chosen(directory: Path) -> Path | None:
    """Find the file that transformers starts from."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).exists()), None)


def _read_index(path: Path) -> _Index:
    _require_content(path)
    try:
        index = read_record(path, _Index)
        if bad := [name for name in sorted(index.weight_map.values()) if not is_inside(name)]:
            raise BadFile(path, f"it names {bad[0]!r}, which is no file of its folder")
    except BadFile as error:
        raise ConfigError(path, None, f"not an index of weight files ({error.reason}); copy it again") from error
    if index.metadata is None:
        raise ConfigError(
            path,
            None,
            'no `metadata` in it, without which transformers does not read an index; add "metadata": {} '
            "beside weight_map, or copy it again",
        )
    return index


def _require_as_indexed(directory: Path, places: Mapping[str, Path]) -> None:
    """Refuse an index that names another file for a tensor than the one that holds it."""
    chosen = _chosen(directory)
    if chosen is None or chosen.suffix != ".json":
        return
    weight_map = _read_index(chosen).weight_map
    if any(name not in places for name in weight_map):
        # A shard that the index names for no tensor is not among those that were read.
        stem, layout = chosen.name.split(".")[:2]
        for path in sorted({*directory.glob(f"{stem}*.{layout}")} - {*places.values()}):
            places = dict.fromkeys(header(path), path) | {**places}
    wrong = sorted(name for name, file in weight_map.items() if name in places and places[name] != directory / file)
    if wrong:
        name = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(
            "model.path",
            directory,
            f"{chosen.name} says that {name} is in {weight_map[name]}, and it is in "
            f"{places[name].name}{others}; copy the index and the shards of one save again",
        )


def _safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: _on_meta(file, name) for name in file.keys()}  # noqa: SIM118


def _on_meta(file: Any, name: str) -> Tensor:
    part = file.get_slice(name)
    shape = part.get_shape()
    # No row is enough to know the dtype.
    return torch.empty(shape, dtype=(part[:0] if shape else file.get_tensor(name)).dtype, device="meta")


def _unpickled(path: Path, **options: Any) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True, **options)
    return content


def _require_flat(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse tensors that are nested in the file, of which transformers would find none."""
    nested = [
        str(key)
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values())
    ]
    if nested:
        raise ConfigError(
            path,
            None,
            f"a trainer's checkpoint, with tensors nested under `{'`, `'.join(nested[:NAMED])}`; save those of "
            f"the model by themselves, torch.save(torch.load(FILE)[{nested[0]!r}], FILE)",
        )


def _pieces(path: Path, name: str) -> Iterator[Tensor]:
    if path.suffix != ".safetensors":
        # Files from before torch 1.6 are no archives, and are read whole.
        tensor: Tensor = _unpickled(path, map_location="cpu", mmap=zipfile.is_zipfile(path))[name]
        yield from tensor.split(ROWS)
        return
    with safe_open(path, "pt") as file:
        part = file.get_slice(name)
        for row in range(0, part.get_shape()[0], ROWS):
            yield part[row : row + ROWS]


def _require_content(path: Path) -> None:
    require_regular(path)
    if is_lfs_pointer(path):
        raise ConfigError(
            path, None, f"a git-lfs pointer instead of the file; run `git lfs pull` in {path.parent}, or fetch it again"
        )


def _no_weights(directory: Path) -> str:
    others = sorted(path.name for path in directory.iterdir() if path.suffix in OTHER_LAYOUTS)
    there = f"{', '.join(others[:NAMED])} is not in transformers' layout; " if others else ""
    return (
        f"no weights in it ({WEIGHT_FILES[0]} or an index of shards); {there}give a directory that save_pretrained "
        "writes"
    )
