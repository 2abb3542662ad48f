"""The run folder: created, checked and guarded against a changed configuration before anything expensive starts."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from clex_train import distributed, log, recorded_config
from clex_train.config import Config, Resume
from clex_train.locks import Lock, try_lock

logger = log.get(__name__)

CONFIG = "config.yaml"
LOCKS = "locks"

SAFE_TO_CHANGE = (
    "attention.implementation",
    "checkpoint.",
    "data.domains.",
    "data.path",
    "data.skip_rows",
    "data.weights_at",
    "engine.activation_checkpointing",
    "engine.liger",
    "engine.offload_activations",
    "engine.tiled_loss",
    "engine.tiled_mlp",
    "engine.timeout",
    "engine.world_size",
    "evaluation.",
    "launch.",
    "model.allow_missing",
    "model.config",
    "model.path",
    "model.revision",
    "model.tokenizer",
    "max_runtime",
    "name",
    "output_dir",
    "resume",
    "scaling.longrope_factors",
    "scaling.t_factor",
    "tracking.",
)
"""Keys that may differ when a run is continued: they do not touch the numbers it trains on.

Directories are among them because the checkpoint knows what they hold: data and vocabulary by a fingerprint, the
architecture and its frequencies by a digest, weights by its own. Domains, weights and skipped rows are because it knows
the order of the rows that it has seen, and refuses another.
"""

MOVED = ("data.path", "evaluation.path", "model.path", "model.revision", "model.tokenizer", "scaling.longrope_factors")
"""Of those, what is said in a line when it differs."""

SHARING = ("engine.micro_batch", "engine.accumulation", "engine.sequence_parallel")
"""What optim.batch_rows, and rows, are divided by; a change of it alone would only change how sums are rounded."""


def check_config(
    config: Config, has_checkpoint: bool, other_ranks: bool = False, own_context: int | None = None
) -> None:
    """Compare with the run that the folder holds; every rank may call it, nothing is written.

    On another number of ranks, the rows of a step may be shared out in another way. `own_context` is L as the model
    says it, which is what a `model.context_len` of null stands for.

    Raises `ValueError` when the folder holds a checkpoint although `resume=never`, or a run whose configuration
    differs in a key that is not safe to change.
    """
    path = Path(config.output_dir) / CONFIG
    if not has_checkpoint:
        return
    if config.resume is Resume.never:
        raise ValueError(f"resume=never: {path.parent} already holds checkpoints; choose another output_dir")
    if path.exists():
        _refuse_changes(path, config, SAFE_TO_CHANGE + (SHARING if other_ranks else ()), own_context)


def write_config(config: Config) -> None:
    """Write `config.yaml` into the run folder, whole or not at all; on one rank."""
    path = Path(config.output_dir) / CONFIG
    beside = path.with_suffix(".tmp")
    beside.write_text(as_yaml(config), encoding="utf-8")
    beside.replace(path)


def require_writable(folder: Path) -> None:
    """Create the folder and prove with a file that it can be written."""
    probe = folder / f".writable_{socket.gethostname()}_{os.getpid()}"
    try:
        _open_below(folder, probe, "w").close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir={folder}: cannot be written ({error.strerror}); choose another") from error


@contextmanager
def left_as_found(folder: Path) -> Iterator[None]:
    """Remove a folder again that was made inside and holds nothing when a `ValueError` refuses the launch.

    Rank 0 alone removes, and only what was not there when it came: the other ranks may be about to open a file there.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()] if distributed.is_main() else []
    try:
        yield
    except ValueError:
        if folder in made and folder.is_dir() and all(entry.name == LOCKS for entry in folder.iterdir()):
            shutil.rmtree(folder / LOCKS, ignore_errors=True)
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise


@contextmanager
def held(folder: Path, rank: int, patience: float) -> Iterator[None]:
    """Keep other launches out of a run folder; the kernel lets go of it when this process dies.

    Waits up to `patience` seconds for the same rank of an earlier launch, which may still be saving after its launcher
    was killed. `ValueError` when it does not end.
    """
    path = folder / LOCKS / f"rank_{rank}"
    with _open_below(path.parent, path, "a+") as file:
        _lock(file, path, patience)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _open_below(folder: Path, path: Path, mode: str) -> IO[str]:
    """Open a file in a folder, which is made if need be; once more where rank 0 removed it in between."""
    with suppress(FileNotFoundError):
        folder.mkdir(parents=True, exist_ok=True)
        return path.open(mode, encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    return path.open(mode, encoding="utf-8")


def _lock(file: IO[str], path: Path, patience: float) -> None:
    start, said, folder = time.monotonic(), False, path.parents[1]
    while try_lock(file, path, "start one launch at a time") is Lock.busy:
        holder = path.read_text(encoding="utf-8").strip()
        if time.monotonic() - start > patience:
            raise ValueError(f"output_dir={folder}: in use by {holder}; end it or choose another")
        if not said:
            logger.warning("waits for %s, which is still in %s", holder, folder)
        said = True
        time.sleep(0.2)


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested configurations."""
    changed = []
    for key in sorted({*old, *new}, key=str):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return changed


def _refuse_changes(path: Path, config: Config, safe: tuple[str, ...], own_context: int | None) -> None:
    # Over the defaults, so that a key which the program has learned since does not count as a change.
    recorded, now = recorded_config.over_defaults(path), recorded_config.plain(OmegaConf.structured(config))
    old, new = (_resolved(each, own_context) for each in (recorded, now))
    changed = changed_keys(old, new)
    unsafe = [key for key in changed if not key.startswith(safe)]
    if unsafe == ["optim.steps"] and (path.parent / "final").is_dir():
        raise ValueError(
            f"optim.steps={config.optim.steps}: {path.parent} is finished after {old['optim']['steps']} steps, "
            "for which its learning rate was scheduled; train its final model on in another output_dir, with "
            f"model.path={path.parent / 'final'}"
        )
    if unsafe:
        raise ValueError(
            f"{', '.join(unsafe)}: differs from {path}, whose checkpoints this run would continue; "
            "restore the value or choose another output_dir"
        )
    for key in changed:
        if key in MOVED and distributed.is_main():
            group, _, name = key.rpartition(".")
            before, after = (each[group].get(name) for each in (old, new))
            logger.info("%s was %s, is %s now: the run goes on from its own checkpoint", key, before, after)


def _resolved(plain: dict[str, Any], own_context: int | None) -> dict[str, Any]:
    """A configuration with what keys of the model stand for when they are left out: earlier ones spelt them out."""
    model = dict(plain["model"])
    model["init"] = model.get("init") or ("pretrained" if model.get("path") else "random")
    model["context_len"] = model.get("context_len") or own_context
    return {**plain, "model": model}
