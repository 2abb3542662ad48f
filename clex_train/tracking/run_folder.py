"""The run folder: creation, locking, cleanup, and the check for a changed configuration on resume."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from clex_train.config.root import Config, Resume
from clex_train.tracking import saved_config as recorded_config
from clex_train.tracking.saved_config import CONFIG, FINAL
from clex_train.utils import distributed, files, log
from clex_train.utils.errors import NO_ROOM, ConfigError, InputError, first_line
from clex_train.utils.files import BadFile
from clex_train.utils.locks import Lock, try_lock
from clex_train.utils.records import read_json

logger = log.get(__name__)

LOCKS = "locks"
WRITTEN_FIRST = (LOCKS, CONFIG, "environment.json")
"""Entries that a launch creates in a new folder before it trains."""

SAFE_TO_CHANGE = (
    "adapter.save",
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
    "scaling.final_t",
    "tracking.",
)
"""Keys that may change on resume because they do not affect the training numbers.

Paths may change because the checkpoint identifies their contents: data and vocabulary by a fingerprint, the
architecture and its frequencies by a digest, and the weights by its own copy. Domains, weights and skipped rows may
change because the checkpoint records the order of the rows already read and refuses another.
"""

MOVED = ("data.path", "evaluation.path", "model.path", "model.revision", "model.tokenizer", "scaling.longrope_factors")
"""The safe keys whose change is logged."""

SHARING = ("engine.micro_batch", "engine.accumulation", "engine.sequence_parallel")
"""Keys that split the global batch. Changing them changes only the rounding of sums, so another world size may."""


def check_config(
    config: Config,
    has_checkpoint: bool,
    other_ranks: bool = False,
    own_context: int | None = None,
    copy: Path | None = None,
) -> None:
    """Compare the configuration with that of the run in the folder. Writes nothing; not collective.

    Args:
        config: the present configuration.
        has_checkpoint: without one, any configuration is accepted.
        other_ranks: the world size differs, so the split of the global batch may differ too.
        own_context: the model's own L in tokens, the meaning of `model.context_len=null`.
        copy: verified configuration of the newest checkpoint, used instead of a config.yaml that may be damaged.

    Raises `ConfigError` when there is a checkpoint but `resume=never`, or if a key differs that is not safe to change.
    """
    path = Path(config.output_dir) / CONFIG
    if not has_checkpoint:
        return
    if config.resume is Resume.never:
        raise ConfigError("resume", "never", f"{path.parent} already holds checkpoints; choose another output_dir")
    if copy or path.exists():
        _refuse_changes(path, copy or path, config, SAFE_TO_CHANGE + (SHARING if other_ranks else ()), own_context)


def write_config(config: Config) -> None:
    """Write `config.yaml` into the run folder, atomically. Call it on one rank."""
    files.write_atomically(Path(config.output_dir) / CONFIG, as_yaml(config))


def restore_config(config: Config, copy: Path | None) -> None:
    """Rewrite a missing or damaged config.yaml, and log it. Call it on one rank, after `check_config`.

    Uses the checkpoint's `copy` if there is one, else the present configuration.
    """
    path = Path(config.output_dir) / CONFIG
    try:
        if path.exists():
            recorded_config.over_defaults(path)
            return
    except InputError as error:
        logger.warning("%s is damaged (%s); moved to %s", path, _reason(error), files.quarantine(path).name)
    files.write_atomically(path, copy.read_bytes() if copy else as_yaml(config))
    logger.info("restored %s%s", path, f" from {copy}" if copy else "")


def _reason(error: InputError) -> str:
    cause = error.__cause__
    return cause.reason if isinstance(cause, BadFile) else first_line(error)


def tidy(folder: Path) -> None:
    """Clean up after interrupted launches and move damaged records aside. Call it on rank 0, under its lock."""
    files.recover(folder / FINAL)
    # Only what a training run writes: an evaluation program takes no lock and may be writing its own files now.
    own = ("config", "metrics", "wandb_id", "trackio_id", "environment", "evaluation/step_")
    for pattern in (".writable_*", *(f"{name}*{files.TEMPORARY_SUFFIX}" for name in own)):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)
    for leftover in folder.glob(f"{files.REMOVING}*{FINAL}"):
        files.remove_folder(leftover)
    for record in folder.glob("environment*.json"):
        try:
            read_json(record, within=folder)
        except BadFile:
            logger.warning("%s is damaged; moved to %s", record, files.quarantine(record).name)


def require_writable(folder: Path) -> None:
    """Create the folder and a test file in it. Raises `ConfigError`, or `OSError` for a full disk."""
    # `os.access` is wrong on network file systems and says nothing about quotas. The name is unique per process, as
    # all ranks may test at once.
    probe = folder / f".writable_{socket.gethostname()}_{os.getpid()}"
    try:
        _open_below(folder, probe, "w").close()
        probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise ConfigError("output_dir", folder, f"cannot be written ({error.strerror}); choose another") from error


@contextmanager
def opened(folder: Path, patience: float) -> Iterator[None]:
    """Create, lock and tidy the folder of a run, for as long as this launch is in it.

    A launch that is refused inside leaves nothing behind. Raises as `require_writable` and `run_lock` do.
    """
    with left_as_found(folder):
        require_writable(folder)
        with run_lock(folder, distributed.rank(), patience):
            if distributed.is_main():
                tidy(folder)
            yield


@contextmanager
def left_as_found(folder: Path) -> Iterator[None]:
    """Remove a folder that was created inside the block when the launch is refused (`InputError`) or interrupted.

    A refused launch removes empty folders only; an interrupted one also what it wrote before training.
    """
    # Parents too, such as `runs/`. Every rank removes what did not exist when it started; `rmdir` spares the rest.
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except (InputError, KeyboardInterrupt) as end:
        interrupted = isinstance(end, KeyboardInterrupt) and distributed.is_main()
        if interrupted and folder in made and all(entry.name in WRITTEN_FIRST for entry in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        # Children come before their parents in `made`; the first folder that is not empty ends the loop.
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise


@contextmanager
def run_lock(folder: Path, rank: int, patience: float) -> Iterator[None]:
    """Lock a run folder against other launches; the kernel releases the lock when this process dies.

    Waits up to `patience` seconds for the same rank of an earlier launch, then raises `ConfigError`. A launch refused
    inside the block leaves no locks in an otherwise empty folder.
    """
    # One lock per rank: after its launcher was killed, any rank of an earlier launch may still be saving.
    path, is_ours = folder / LOCKS / f"rank_{rank}", False
    try:
        with _open_below(path.parent, path, "a+") as file:
            _lock(file, path, patience)
            is_ours = True
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
    except InputError:
        if is_ours and all(entry.name == LOCKS for entry in folder.glob("*")):
            _remove_locks(path, rank)
        raise


def _remove_locks(path: Path, rank: int) -> None:
    """Remove the locks of all ranks on rank 0, and this rank's own elsewhere."""
    # Rank 0's launcher is about to end the others. One that is about to open its lock recreates the folder.
    if rank == 0:
        shutil.rmtree(path.parent, ignore_errors=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def _open_below(folder: Path, path: Path, mode: str) -> IO[str]:
    """Open a file in a folder, creating the folder if needed."""
    # Rank 0 may remove the folder between the two calls (`_remove_locks`), so try twice.
    with suppress(FileNotFoundError):
        files.make_folder(folder)
        return path.open(mode, encoding="utf-8")
    files.make_folder(folder)
    return path.open(mode, encoding="utf-8")


def _lock(file: IO[str], path: Path, patience: float) -> None:
    start, was_logged, folder = time.monotonic(), False, path.parents[1]
    while try_lock(file, path, "start one launch at a time") is Lock.busy:
        holder = path.read_text(encoding="utf-8").strip()
        if time.monotonic() - start > patience:
            raise ConfigError("output_dir", folder, f"in use by {holder}; end it or choose another")
        if not was_logged:
            logger.warning("waiting for %s, which still uses %s", holder, folder)
        was_logged = True
        time.sleep(0.2)


def as_yaml(config: Config) -> str:
    """Render the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys whose values differ between two nested configurations."""
    changed = []
    for key in sorted({*old, *new}, key=str):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return changed


def _refuse_changes(path: Path, before: Path, config: Config, safe: tuple[str, ...], own_context: int | None) -> None:
    # Merged over the defaults, so that a key added by a newer version does not count as a change.
    recorded, now = recorded_config.over_defaults(before), recorded_config.plain(OmegaConf.structured(config))
    old, new = (_resolved(each, own_context) for each in (recorded, now))
    changed = changed_keys(old, new)
    unsafe = [key for key in changed if not key.startswith(safe)]
    # Training longer is the most common case: the schedule of a finished run has already decayed.
    if unsafe == ["optim.steps"] and (path.parent / FINAL).is_dir():
        raise ConfigError(
            "optim.steps",
            config.optim.steps,
            f"{path.parent} is finished after {old['optim']['steps']} steps, "
            "for which its learning rate was scheduled; train its final model on in another output_dir, with "
            f"model.path={path.parent / 'final'}",
        )
    if unsafe:
        raise ConfigError(
            ", ".join(unsafe),
            None,
            f"differs from {path}, whose checkpoints this run would continue; "
            "restore the value or choose another output_dir",
        )
    for key in changed:
        if key in MOVED and distributed.is_main():
            group, _, name = key.rpartition(".")
            before, after = (each[group].get(name) for each in (old, new))
            logger.info("%s changed from %s to %s; the run resumes from its own checkpoint", key, before, after)


def _resolved(plain: dict[str, Any], own_context: int | None) -> dict[str, Any]:
    """Fill in the meaning of model keys that are left out."""
    # Configurations of earlier versions spell these out, and must compare equal to a null of today.
    model = dict(plain["model"])
    model["init"] = model.get("init") or ("pretrained" if model.get("path") else "random")
    model["context_len"] = model.get("context_len") or own_context
    return {**plain, "model": model}
