"""Weights of an export: linked, copied, or rewritten tensor by tensor where some change or are left out.

Shapes and names are those of the files. A rewritten file needs memory for one file, not for the model.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clex_train.models import weight_files
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.records import read_json

LARGEST_INDEX = 2**28
"""Bytes of an index of weight files that are read."""
Change = Callable[[Tensor], Tensor]

COMPANIONS = (
    "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
    "additional_chat_templates/*", "generation_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files beside the weights that belong to a model: tokenizer, chat templates, code, licence."""


def weight_paths(directory: Path) -> list[Path]:
    """List the weight files of a directory that transformers reads, and their index."""
    index = _index(directory)
    nested = [path for path in weight_files.files(directory) if path.parent != directory]
    require(not nested, "model", str(directory), "its index names files in other folders; save it by save_pretrained")
    return [*weight_files.files(directory), *([] if index is None else [index])]


def tensor_places(directory: Path) -> dict[str, Path]:
    """Map the name of every tensor to its file; `ConfigError` unless all files are safetensors."""
    for path in weight_files.files(directory):
        require(
            path.suffix == ".safetensors",
            "model",
            str(directory),
            f"{path.name} has to be rewritten, which takes safetensors; save the model again by save_pretrained",
        )
    return weight_files.read_headers(directory).places


def read_tensor(places: Mapping[str, Path], name: str) -> Tensor:
    """Read one tensor."""
    with safe_open(places[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def stored_name(name: str, places: Mapping[str, Path]) -> str:
    """Find a parameter in the files, with or without the prefix of the model's body; `ConfigError` if it is missing."""
    if name in places:
        return name
    like = [each for each in places if each.endswith(f".{name}") or name.endswith(f".{each}")]
    require(len(like) == 1, "log_scale", "folded", f"the weights have no single tensor {name}; use log_scale=off")
    return like[0]


def place(source: Path, target: Path, link: bool) -> None:
    """Copy a file, or link it: hard within a file system, so that it survives its source, else symbolic."""
    if not link:
        shutil.copyfile(source, target)
        return
    # Snapshots of the hub's cache are links themselves.
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        target.symlink_to(real)


def place_weights(source: Path, folder: Path, link: bool) -> None:
    """Put the weight files and their index into `folder`, unchanged."""
    for path in weight_paths(source):
        place(path, folder / path.name, link)


def rewrite_weights(
    source: Path, folder: Path, changes: Mapping[str, Change], dropped: Callable[[str], bool], link: bool
) -> None:
    """Write the weights with changed tensors, without `dropped` ones; files that keep all of theirs are placed."""
    places = tensor_places(source)
    for path in weight_files.files(source):
        names = [name for name, file in places.items() if file == path]
        if not any(name in changes or dropped(name) for name in names):
            place(path, folder / path.name, link)
            continue
        with safe_open(path, "pt") as file:
            tensors = {n: _changed(file.get_tensor(n), changes.get(n)) for n in names if not dropped(n)}
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    _write_index(source, folder, dropped)


def _changed(tensor: Tensor, change: Change | None) -> Tensor:
    """Apply a change in float64 and round once, to the dtype of the file."""
    return tensor if change is None else change(tensor.to(torch.float64)).to(tensor.dtype)


def _write_index(source: Path, folder: Path, dropped: Callable[[str], bool]) -> None:
    index = _index(source)
    if index is None:
        return
    listing = read_json(index, most=LARGEST_INDEX)
    listing["weight_map"] = {name: file for name, file in listing["weight_map"].items() if not dropped(name)}
    (folder / index.name).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _index(directory: Path) -> Path | None:
    first = next((name for name in weight_files.WEIGHT_FILES if (directory / name).exists()), "")
    return directory / first if first.endswith(".json") else None


def companions(source: Path) -> list[Path]:
    """List the files of a directory that go with its weights, relative to it."""
    found = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    weights = {*weight_paths(source)}
    return sorted(path.relative_to(source) for path in found - weights if not path.name.startswith("."))


def raise_tokenizer_limit(folder: Path, num_tokens: int) -> None:
    """Let the tokenizer of an export take `num_tokens` tokens, since vLLM serves no more than it states."""
    path = folder / "tokenizer_config.json"
    facts = read_json(path) if path.is_file() else {}
    if isinstance(facts, dict) and isinstance(limit := facts.get("model_max_length"), int) and limit < num_tokens:
        path.write_text(json.dumps(facts | {"model_max_length": num_tokens}, indent=2) + "\n", encoding="utf-8")


def size(paths: list[Path]) -> int:
    """Return the bytes of files, links followed."""
    return sum(path.stat().st_size for path in paths)


def require_space(output: Path, needed: int) -> None:
    """Raise `ConfigError` before anything is written if the disk has fewer than `needed` bytes free."""
    there = next(place for place in output.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            "output",
            output,
            f"{there} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f}; make room, name another "
            "place, or link unchanged weights by weights=link",
        )
