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

from clex_train.config import recorded as recorded_config
from clex_train.config.recorded import CONFIG
from clex_train.config.root import Config, Resume
from clex_train.utils import distributed, files, log
from clex_train.utils.errors import NO_ROOM, ConfigError, InputError, first_line
from clex_train.utils.files import BadFile
from clex_train.utils.locks import Lock, try_lock
from clex_train.utils.records import read_json

logger = log.get(__name__)

LOCKS = "locks"
FINAL = "final"
WRITTEN_FIRST = (LOCKS, CONFIG, "environment.json")
"""What a launch leaves in a new folder before it trains."""

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
    config: Config,
    has_checkpoint: bool,
    other_ranks: bool = False,
    own_context: int | None = None,
    copy: Path | None = None,
) -> None:
    """Compare with the run that the folder holds; every rank may call it, nothing is written.

    On another number of ranks, the rows of a step may be shared out in another way. `own_context` is L as the model
    says it, which is what a `model.context_len` of null stands for. `copy` is the configuration that the newest
    checkpoint was written under, verified: where there is one, config.yaml may be damaged or missing.

    Raises `ValueError` when the folder holds a checkpoint although `resume=never`, or a run whose configuration
    differs in a key that is not safe to change.
    """
    path = Path(config.output_dir) / CONFIG
    if not has_checkpoint:
        return
    if config.resume is Resume.never:
        raise ConfigError("resume", "never", f"{path.parent} already holds checkpoints; choose another output_dir")
    if copy or path.exists():
        _refuse_changes(path, copy or path, config, SAFE_TO_CHANGE + (SHARING if other_ranks else ()), own_context)


def write_config(config: Config) -> None:
    """Write `config.yaml` into the run folder, whole or not at all; on one rank."""
    files.write_atomically(Path(config.output_dir) / CONFIG, as_yaml(config))


def restore_config(config: Config, copy: Path | None) -> None:
    """Write a missing or damaged config.yaml anew, with a line; on one rank.

    It gets the text of the checkpoint's `copy`, or else that of the present configuration, which is checked to agree.
    """
    path = Path(config.output_dir) / CONFIG
    try:
        if path.exists():
            recorded_config.over_defaults(path)
            return
    except InputError as error:
        logger.warning("%s is damaged (%s); kept as %s", path, _reason(error), files.quarantine(path).name)
    files.write_atomically(path, copy.read_bytes() if copy else as_yaml(config))
    logger.info("%s is restored%s", path, f" from {copy}" if copy else "")


def _reason(error: InputError) -> str:
    cause = error.__cause__
    return cause.reason if isinstance(cause, BadFile) else first_line(error)


def tidy(folder: Path) -> None:
    """Remove what interrupted launches left in a run folder, and set damaged records aside; on rank 0, under its lock.

    Evaluations of other programs, which hold no lock, are left alone.
    """
    files.recover(folder / FINAL)
    own = ("config", "metrics", "wandb_id", "environment", "evaluation/step_")
    for pattern in (".writable_*", *(f"{name}*{files.TEMPORARY_SUFFIX}" for name in own)):
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)
    for leftover in folder.glob(f"{files.REMOVING}*{FINAL}"):
        files.remove_folder(leftover)
    for record in folder.glob("environment*.json"):
        try:
            read_json(record, within=folder)
        except BadFile:
            logger.warning("%s is damaged; kept as %s", record, files.quarantine(record).name)


def require_writable(folder: Path) -> None:
    """Create the folder and prove with a file that it can be written. A full disk is an `OSError`."""
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

    A launch that is refused inside leaves nothing behind. Raises as `require_writable` and `held` do.
    """
    with left_as_found(folder):
        require_writable(folder)
        with held(folder, distributed.rank(), patience):
            if distributed.is_main():
                tidy(folder)
            yield


@contextmanager
def left_as_found(folder: Path) -> Iterator[None]:
    """Remove a folder again that was made inside and holds nothing when the launch is refused or interrupted.

    An `InputError` refuses it. What an interrupted launch has written before it trains goes too.

    Of several ranks each removes what was not there when it came.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except (InputError, KeyboardInterrupt) as end:
        interrupted = isinstance(end, KeyboardInterrupt) and distributed.is_main()
        if interrupted and folder in made and all(entry.name in WRITTEN_FIRST for entry in folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for place in made:
                place.rmdir()
        raise


@contextmanager
def held(folder: Path, rank: int, patience: float) -> Iterator[None]:
    """Keep other launches out of a run folder; the kernel lets go of it when this process dies.

    Waits up to `patience` seconds for the same rank of an earlier launch, which may still be saving after its launcher
    was killed. `ValueError` when it does not end. A launch that is refused inside leaves no locks in an empty folder.
    """
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
    """Rank 0 removes those of every rank, which its launcher is about to end; another rank its own.

    A rank that is about to open its own finds the folder gone and makes it once more.
    """
    if rank == 0:
        shutil.rmtree(path.parent, ignore_errors=True)
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def _open_below(folder: Path, path: Path, mode: str) -> IO[str]:
    """Open a file in a folder, which is made if need be; once more where rank 0 removed it in between."""
    with suppress(FileNotFoundError):
        files.make_folder(folder)
        return path.open(mode, encoding="utf-8")
    files.make_folder(folder)
    return path.open(mode, encoding="utf-8")


def _lock(file: IO[str], path: Path, patience: float) -> None:
    start, said, folder = time.monotonic(), False, path.parents[1]
    while try_lock(file, path, "start one launch at a time") is Lock.busy:
        holder = path.read_text(encoding="utf-8").strip()
        if time.monotonic() - start > patience:
            raise ConfigError("output_dir", folder, f"in use by {holder}; end it or choose another")
        if not said:
            logger.warning("waits for %s, which is still in %s", holder, folder)
        said = True
        time.sleep(0.2)


def as_yaml(config: Config) -> str:
    """Render the resolved configuration as YAML."""
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


def _refuse_changes(path: Path, before: Path, config: Config, safe: tuple[str, ...], own_context: int | None) -> None:
    # Over the defaults, so that a key which the program has learned since does not count as a change.
    recorded, now = recorded_config.over_defaults(before), recorded_config.plain(OmegaConf.structured(config))
    old, new = (_resolved(each, own_context) for each in (recorded, now))
    changed = changed_keys(old, new)
    unsafe = [key for key in changed if not key.startswith(safe)]
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
            logger.info("%s was %s, is %s now: the run goes on from its own checkpoint", key, before, after)


def _resolved(plain: dict[str, Any], own_context: int | None) -> dict[str, Any]:
    """Fill in what keys of the model stand for when they are left out: earlier configurations spelt them out."""
    model = dict(plain["model"])
    model["init"] = model.get("init") or ("pretrained" if model.get("path") else "random")
    model["context_len"] = model.get("context_len") or own_context
    return {**plain, "model": model}
