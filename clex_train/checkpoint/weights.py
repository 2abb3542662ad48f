"""Weights of a checkpoint, read one parameter at a time: in float32, from any ZeRO stage and any number of ranks.

An optimizer updates float32 copies of the weights, which DeepSpeed stores flat and cut into one part per rank. The
files are mapped into memory, so opening a checkpoint reads almost nothing, and `read` reads one parameter.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clex_train.checkpoint.listing import Found, damage_in, list_checkpoints, step_of
from clex_train.checkpoint.safe_load import RunsCode, tensors_only
from clex_train.utils.errors import ConfigError, first_line, require

MODEL, OPTIMIZER = "_model_states.pt", "_optim_states.pt"
"""Ends of the names of DeepSpeed's files."""
RANK = re.compile(r"zero_pp_rank_(\d+)_")
GONE = "restore it, average fewer, or try again if the run is still training, which removes old checkpoints"


@dataclass(frozen=True)
class StoredWeights:
    """The parameters of one checkpoint on disk."""

    path: Path
    step: int
    dtype: torch.dtype
    """Type of the weights in the model that was trained."""
    shapes: dict[str, torch.Size]
    """Shape of each parameter by name, in the order of the files; tied parameters once."""
    parts: dict[str, list[Tensor]]
    """Its float32 values in pieces, in order; the last may end in padding."""

    def read(self, name: str) -> Tensor:
        """Read a parameter in its shape, float32."""
        shape = self.shapes[name]
        flat = torch.cat([part.flatten().float() for part in self.parts[name]])
        return flat[: math.prod(shape)].view(shape)


def newest(folder: Path, count: int) -> list[Found]:
    """Return the `count` newest checkpoints of a folder, oldest first, after their contents were verified.

    Raises:
        ConfigError: there are fewer, or one of these is damaged; an older one never takes its place.
        RunsCode: a file would run code.
    """
    good, damage = list_checkpoints(folder)
    paths = sorted([*(found.path for found in good), *damage], key=step_of)[-count:]
    require(
        len(paths) == count,
        "last",
        count,
        f"{folder} has {len(paths)} checkpoints; a run keeps more with checkpoint.every and checkpoint.keep_last or "
        "checkpoint.keep_every",
    )
    by_path = {found.path: found for found in good}
    for path in paths:
        # `list_checkpoints` compares sizes only; a flipped bit of a weight would otherwise enter the mean.
        reason = damage.get(path) or damage_in(by_path[path], list(by_path[path].manifest.files))
        if isinstance(reason, RunsCode):
            raise reason
        require(reason is None, f"checkpoint {path}", None, f"damaged ({reason}); {GONE}")
    return [by_path[path] for path in paths]


def open_weights(found: Found) -> StoredWeights:
    """Map the files of a checkpoint and find every parameter in them. Raises `ConfigError` for an unknown layout."""
    with tensors_only(found.path):
        models, optimizers = (_load(found, ending) for ending in (MODEL, OPTIMIZER))
        try:
            module = models[0]["module"]
            if len(optimizers) != (found.manifest.world_size if found.manifest.zero_stage else 0):
                raise ValueError(f"{len(optimizers)} files of optimizer states")
            read = {0: _whole, 1: _partitions, 2: _partitions, 3: _shards}[found.manifest.zero_stage]
            shapes, parts = read(models, optimizers)
            dtype = next(tensor.dtype for tensor in module.values() if tensor.is_floating_point())
        except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
            raise ConfigError(
                f"checkpoint {found.path}",
                None,
                f"its files are not laid out as DeepSpeed {found.manifest.versions.get('deepspeed', '')} writes "
                f"ZeRO-{found.manifest.zero_stage} ({first_line(error)}); average where the run was trained",
            ) from error
    return StoredWeights(found.path, found.manifest.step, dtype, shapes, parts)


def open_field(found: Found, name: str) -> dict[str, Tensor] | None:
    """Read the state of the CLEX field from the file `name`; None in a run without one."""
    if name not in found.manifest.files:
        return None
    with tensors_only(found.path):
        state = torch.load(found.path / name, weights_only=True)
    # A run without a field stores the state of its spike watch alone.
    field: dict[str, Tensor] | None = state.get("clex")
    return field


def require_alike(key: str, shapes: Sequence[dict[str, torch.Size]], names: Sequence[str]) -> None:
    """Raise `ConfigError` unless all have the same parameters with the same shapes; `names` are theirs."""
    for other, name in zip(shapes[1:], names[1:], strict=True):
        unlike = sorted(each for each in {*shapes[0], *other} if shapes[0].get(each, None) != other.get(each, None))
        require(
            not unlike,
            key,
            name,
            f"{len(unlike)} parameters differ in name or shape from {names[0]}, such as {', '.join(unlike[:1])}; "
            "average checkpoints of one run",
        )


def mean(stored: Sequence[StoredWeights], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the mean of each parameter over checkpoints of equal shapes, summed in float64 and rounded once to `dtype`.

    Memory holds one parameter in float64 and float32 beside what the caller keeps.
    """
    for name, shape in stored[0].shapes.items():
        # float64 is wide enough that the order of the checkpoints does not show in the rounded mean.
        total = torch.zeros(shape, dtype=torch.float64)
        for each in stored:
            total += each.read(name)
        yield name, (total / len(stored)).to(dtype)


def _load(found: Found, ending: str) -> list[dict[str, Any]]:
    """Map the files of all ranks, in the order of ranks."""
    # By number: rank 10 comes before rank 2 in the order of names.
    names = sorted((name for name in found.manifest.files if name.endswith(ending)), key=_rank)
    return [torch.load(found.path / name, map_location="cpu", mmap=True, weights_only=True) for name in names]


def _rank(name: str) -> int:
    matched = RANK.search(name)
    return int(matched[1]) if matched else 0


Layout = tuple[dict[str, torch.Size], dict[str, list[Tensor]]]


def _whole(models: list[dict[str, Any]], _: list[dict[str, Any]]) -> Layout:
    """Find the parameters of a run without ZeRO: in the model, or in float32 copies of a bf16 one."""
    buffers = {*models[0]["buffer_names"]}
    first: dict[int, str] = {}
    for name, tensor in models[0]["module"].items():
        if name not in buffers:
            # Tied parameters share their storage, and the model names the first of them.
            first.setdefault(tensor.data_ptr(), name)
    named: dict[str, Tensor] = {name: models[0]["module"][name] for name in first.values()}
    # DeepSpeed does not name the copies. They have the order of the optimizer's groups, matrices before vectors.
    groups = models[0]["optimizer"].get("fp32_groups") or []
    ordered = sorted(named, key=lambda name: named[name].dim() <= 1) if len(groups) > 1 else list(named)
    copies = dict(zip(ordered, [copy for group in groups for copy in group], strict=bool(groups)))
    for name, copy in copies.items():
        if not torch.equal(copy.to(named[name].dtype), named[name]):
            raise ValueError(f"the float32 copy of {name} is not where it was expected")
    return {name: each.shape for name, each in named.items()}, {name: [copies.get(name, named[name])] for name in named}


def _partitions(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Layout:
    """Find the parameters under ZeRO-1 and 2, which lay all of a group end to end and cut it into equal partitions."""
    shapes = {name: torch.Size(shape) for group in models[0]["param_shapes"] for name, shape in group.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for rank in (optimizer["optimizer_state_dict"] for optimizer in optimizers):
        groups = zip(rank["param_slice_mappings"], rank["single_partition_of_fp32_groups"], strict=True)
        for places, flat in groups:
            for name, place in places.items():
                parts[name].append(flat.narrow(0, place.start, place.numel))
    return shapes, _complete(shapes, parts)


def _shards(models: list[dict[str, Any]], optimizers: list[dict[str, Any]]) -> Layout:
    """Find the parameters under ZeRO-3, which cuts every parameter into equal parts, the last padded."""
    groups = models[0]["param_shapes"]
    shapes = {name: torch.Size(shape) for group in groups for name, shape in group.items()}
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for rank in (optimizer["optimizer_state_dict"] for optimizer in optimizers):
        for group, flat in zip(groups, rank["fp32_flat_groups"], strict=True):
            start = 0
            for name in group:
                length = math.ceil(math.prod(shapes[name]) / len(optimizers))
                parts[name].append(flat.narrow(0, start, length))
                start += length
    return shapes, _complete(shapes, parts)


def _complete(shapes: dict[str, torch.Size], parts: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Return the parts; raise `ValueError` for a parameter with too few values."""
    for name, shape in shapes.items():
        if sum(part.numel() for part in parts[name]) < math.prod(shape):
            raise ValueError(f"{name} is incomplete")
    return parts
