"""Headers of weight files: name, shape, dtype and file of every tensor of a model directory.

A directory is refused where transformers would silently choose between two tensors of one name, or read other tensors
than its index.
"""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import BadFile, is_inside, is_lfs_pointer, require_regular
from clex_train.utils.records import read_record

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weight files in the order in which transformers looks for them."""
NAMED = 3
"""Names shown in a message at most."""
ROWS = 4096
"""Rows compared at a time: 64 MiB of an embedding of width 4096 in fp32."""
OTHER_LAYOUTS = (".safetensors", ".bin", ".gguf", ".pth", ".pt", ".h5", ".msgpack")
OBJECTS = "Unsupported global"
"""Part of torch's message about a pickle that contains more than tensors."""


class NotThere(ConfigError):
    """A weight file is missing from a model directory."""


@dataclass(frozen=True)
class Stored:
    """All tensors of a directory on the meta device, and the file of each."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class _Index:
    """Fields of `model.safetensors.index.json` that are used here."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def files(directory: Path, or_else: str = "") -> list[Path]:
    """List the weight files that transformers would read. Raises `NotThere` when any are missing.

    `or_else` is appended to the message as a further remedy.
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
    """Read the headers of all weight files. Raises `InputError` for a tensor in two files, or not where indexed."""
    found = Stored()
    for path in files(directory, or_else):
        tensors = header(path)
        # transformers would use whichever shard it reads last.
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
    """Read the tensors of a file on the meta device, by name. Raises `InputError` for a damaged file."""
    _require_content(path)
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path, map_location="meta")
        tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    except Exception as error:  # a damaged archive makes zipfile, pickle and torch raise almost anything
        if OBJECTS in str(error):
            raise ConfigError(
                path,
                None,
                "it has Python objects in addition to tensors, as a trainer's checkpoint does, and they are not "
                "loaded; give a directory that save_pretrained writes",
            ) from error
        reason = first_line(error)
        raise ConfigError(
            path, None, f"not readable weights, cut short or damaged ({reason}); copy it again"
        ) from error
    _require_flat(path, content)
    return tensors


def have_equal_values(stored: Stored, first: str, second: str) -> bool:
    """Compare the contents of two tensors of equal shape, `ROWS` rows at a time."""
    pairs = zip(*(pieces(stored.places[name], name) for name in (first, second)), strict=True)
    # NaN != NaN would report equal tensors as different; `weights.require_finite` reports NaNs by name.
    return all(torch.equal(a.double().nan_to_num(), b.double().nan_to_num()) for a, b in pairs)


def named(names: list[str], what: str = "tensor") -> str:
    """Count names and show the first few."""
    shown = ", ".join(names[:NAMED])
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({shown}{more})"


def _chosen(directory: Path) -> Path | None:
    """Find the weight file or index that transformers would start from."""
    return next((directory / name for name in WEIGHT_FILES if (directory / name).exists()), None)


def _read_index(path: Path) -> _Index:
    _require_content(path)
    try:
        index = read_record(path, _Index)
        if bad := [name for name in sorted(index.weight_map.values()) if not is_inside(name)]:
            raise BadFile(path, f"it names {bad[0]!r}, which is not a file of its folder")
    except BadFile as error:
        raise ConfigError(path, None, f"not an index of weight files ({error.reason}); copy it again") from error
    if index.metadata is None:
        raise ConfigError(
            path,
            None,
            'no `metadata` in it, without which transformers does not read an index; add "metadata": {} '
            "next to weight_map, or copy it again",
        )
    return index


def _require_as_indexed(directory: Path, places: Mapping[str, Path]) -> None:
    """Raise `ConfigError` for an index that maps a tensor to another file than the one that contains it."""
    chosen = _chosen(directory)
    if chosen is None or chosen.suffix != ".json":
        return
    weight_map = _read_index(chosen).weight_map
    if any(name not in places for name in weight_map):
        # A missing tensor may be in a shard that the index never names, and that was therefore not read.
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
    # An empty slice has the dtype and reads no data; a scalar cannot be sliced.
    return torch.empty(shape, dtype=(part[:0] if shape else file.get_tensor(name)).dtype, device="meta")


def _unpickled(path: Path, **options: Any) -> dict[str, Any]:
    # Never without `weights_only`: a pickle of unknown origin can run any code.
    content: dict[str, Any] = torch.load(path, weights_only=True, **options)
    return content


def _require_flat(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for nested tensors, such as a trainer's {"model": {...}}, which transformers ignores."""
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


def pieces(path: Path, name: str) -> Iterator[Tensor]:
    """Yield a tensor of a file, `ROWS` rows at a time."""
    if path.suffix != ".safetensors":
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        tensor: Tensor = _unpickled(path, map_location="cpu", mmap=zipfile.is_zipfile(path))[name]
        yield from tensor.split(ROWS)
        return
    with safe_open(path, "pt") as file:
        part = file.get_slice(name)
        for row in range(0, part.get_shape()[0], ROWS):
            yield part[row : row + ROWS]


def _require_content(path: Path) -> None:
    require_regular(path)
    # A clone without git-lfs has small text files in place of the weights, a frequent mistake with an obscure error.
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
