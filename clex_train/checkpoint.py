"""Checkpoints of a run: DeepSpeed's sharded engine state, the ODE's state and the step, complete or not there at all.

    checkpoints/step_<N>/    DeepSpeed's files, `ode.pt`, `manifest.json`
    checkpoints/latest       the name of the newest complete one

A checkpoint is written into `saving_step_<N>`, flushed to disk and renamed when every rank has finished, then `latest`
is replaced. A folder whose files are not those of its manifest was never complete, or is damaged, and is passed over.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from clex_train import distributed, log
from clex_train.config import Config
from clex_train.data.identity import DataOrder, consumed, data_order
from clex_train.faults import RunStopped

logger = log.get(__name__)

FORMAT = 1
MANIFEST, ODE = "manifest.json", "ode.pt"


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about a checkpoint: the run it belongs to and where the run stood."""

    step: int
    rows_consumed: int
    world_size: int
    zero_stage: int
    architecture: str
    """Digest of the model's architecture; another one cannot be resumed."""
    data_fingerprint: str
    data_order: DataOrder = field(default_factory=dict)
    """Weights of the domains and rows left out, as `data.identity.data_order` records them."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every file beside the manifest."""
    format: int = FORMAT

    @classmethod
    def of_run(cls, config: Config, architecture: str, data_fingerprint: str) -> "Manifest":
        """The identity of a run before its first step."""
        world_size, stage = distributed.world_size(), config.engine.zero_stage
        order = data_order(config.data, config.optim.batch_rows)
        return cls(0, 0, world_size, stage, architecture, data_fingerprint, order)


class Checkpoints:
    """The checkpoints of one run folder.

    Raises `ValueError` on creation, naming what differs, when the newest one belongs to another model, data or launch.
    """

    def __init__(self, run_dir: Path, keep_last: int, identity: Manifest) -> None:
        self.folder = run_dir / "checkpoints"
        self.keep_last = keep_last
        self.identity = identity
        if found := self.newest():
            check_compatible(*found, identity)

    def newest(self) -> tuple[Path, Manifest] | None:
        """The newest complete checkpoint, or None. Files only; every rank may call it alone."""
        found = [(path, manifest) for path in self.folder.glob("step_*") if (manifest := _read_manifest(path))]
        return max(found, key=lambda pair: pair[1].step, default=None)

    def describe_newest(self) -> str:
        """Where a stopped run stands, in words."""
        found = self.newest()
        return f"the last checkpoint is {found[0]}" if found else "there is no checkpoint yet"

    def save(self, engine: Any, ode_state: dict[str, Any] | None, step: int, rows_consumed: int) -> None:
        """Write one checkpoint; collective.

        Raises `RunStopped` when it cannot be written; earlier checkpoints and `latest` are then as they were.
        """
        final, beside = self.folder / f"step_{step}", self.folder / f"saving_step_{step}"
        try:
            if distributed.is_main():
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            distributed.barrier()
            engine.save_checkpoint(str(self.folder), tag=beside.name, save_latest=False)
            if distributed.is_main() and ode_state is not None:
                torch.save(ode_state, beside / ODE)
            _flush(beside)
            distributed.barrier()
            if distributed.is_main():
                sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
                self._publish(
                    replace(self.identity, step=step, rows_consumed=rows_consumed, files=sizes), beside, final
                )
        except (OSError, RuntimeError) as error:
            raise RunStopped(
                f"checkpoint {beside}: cannot be written ({str(error).splitlines()[0]}); earlier ones are intact: "
                "make room and run the same command again"
            ) from error
        distributed.barrier()

    def load(self, engine: Any) -> tuple[int, dict[str, Any] | None] | None:
        """Continue the newest complete checkpoint: (step, ODE state), or None when there is none. Collective.

        Raises `ValueError` when the ranks do not see the same checkpoint.
        """
        found = self.newest()
        name = found[0].name if found else None
        agreed = distributed.broadcast_object(name)
        if distributed.any_rank(name != agreed):
            raise ValueError(
                f"output_dir={self.folder.parent}: the ranks see different checkpoints; it must be on a file system "
                "that all nodes share"
            )
        if found is None:
            return None
        path, manifest = found
        loaded, _ = engine.load_checkpoint(str(self.folder), tag=path.name)
        assert loaded is not None, f"DeepSpeed found nothing in {path}"
        ode_state = torch.load(path / ODE, weights_only=True) if (path / ODE).exists() else None
        logger.info("resumed step %d from %s", manifest.step, path)
        return manifest.step, ode_state

    def _publish(self, manifest: Manifest, beside: Path, final: Path) -> None:
        """Make a written folder the newest checkpoint; on one rank."""
        _write(beside / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _sync_folder(self.folder)
        _write(self.folder / "latest", final.name + "\n")
        self._retire()

    def _retire(self) -> None:
        complete = sorted(
            (manifest.step, path) for path in self.folder.glob("step_*") if (manifest := _read_manifest(path))
        )
        for _, path in complete[: -self.keep_last]:
            shutil.rmtree(path)
        for unfinished in self.folder.glob("saving_step_*"):
            shutil.rmtree(unfinished, ignore_errors=True)


def check_compatible(path: Path, manifest: Manifest, expected: Manifest) -> None:
    """`ValueError` with the remedy when a checkpoint cannot be continued by this run."""
    remedies = {
        "architecture": "it holds a model of another architecture; choose another output_dir",
        "data_fingerprint": "it was trained on another token store; choose another output_dir",
        "world_size": f"it was written by {manifest.world_size} ranks; launch as many again",
        "zero_stage": f"it was written with engine.zero_stage={manifest.zero_stage}; use the same",
    }
    for name, remedy in remedies.items():
        if getattr(manifest, name) != getattr(expected, name):
            raise ValueError(f"checkpoint {path}: {remedy}")
    before, now = (consumed(m.data_order, manifest.rows_consumed) for m in (manifest, expected))
    for name in before:
        if before[name] != now[name]:
            raise ValueError(
                f"data.{name}: checkpoint {path} has read {manifest.rows_consumed} rows under {before[name]}, which "
                f"would have been {now[name]}; change only what comes after, or choose another output_dir"
            )


def _read_manifest(path: Path) -> Manifest | None:
    """The manifest of a complete checkpoint; None if there is none or a file is missing, cut short or too long."""
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text(encoding="utf-8")))
        for name, size in manifest.files.items():
            if (path / name).stat().st_size != size:
                raise OSError(f"{name} does not have {size} bytes")
    except FileNotFoundError as error:
        if (path / MANIFEST).exists():
            logger.warning("checkpoint %s is passed over: %s is missing", path, Path(error.filename).name)
        return None
    except (OSError, json.JSONDecodeError, TypeError) as error:
        logger.warning("checkpoint %s is passed over: %s", path, error)
        return None
    return manifest


def _write(path: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def _flush(folder: Path) -> None:
    """Have this node's writes to the files of a folder on disk before they are declared complete."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
