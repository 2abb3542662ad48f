"""Checkpoints of a run: DeepSpeed's sharded engine state, the ODE's state and the step, complete or not there at all.

    checkpoints/step_<N>/    DeepSpeed's files, `ode.pt`, `manifest.json`
    checkpoints/latest       the name of the newest complete one

A checkpoint is written into `saving_step_<N>` and renamed when every rank has finished, then `latest` is replaced; a
folder without a manifest, or under the temporary name, was never complete and is ignored.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clex_train import distributed, log
from clex_train.config import Config

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
    format: int = FORMAT

    @classmethod
    def of_run(cls, config: Config, architecture: str, data_fingerprint: str) -> "Manifest":
        """The identity of a run before its first step."""
        return cls(0, 0, distributed.world_size(), config.engine.zero_stage, architecture, data_fingerprint)


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

    def save(self, engine: Any, ode_state: dict[str, Any] | None, step: int, rows_consumed: int) -> None:
        """Write one checkpoint; collective. An error leaves the earlier checkpoints and `latest` as they were."""
        manifest = replace(self.identity, step=step, rows_consumed=rows_consumed)
        final, beside = self.folder / f"step_{manifest.step}", self.folder / f"saving_step_{manifest.step}"
        if distributed.is_main():
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        distributed.barrier()
        engine.save_checkpoint(str(self.folder), tag=beside.name, save_latest=False)
        if distributed.is_main():
            if ode_state is not None:
                torch.save(ode_state, beside / ODE)
            (beside / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(final, ignore_errors=True)
            beside.rename(final)
            _replace(self.folder / "latest", final.name + "\n")
            self._retire()
        distributed.barrier()

    def load(self, engine: Any) -> tuple[int, dict[str, Any] | None] | None:
        """Continue the newest complete checkpoint: (step, ODE state), or None when there is none. Collective."""
        found = self.newest()
        if found is None:
            return None
        path, manifest = found
        engine.load_checkpoint(str(self.folder), tag=path.name)
        ode_state = torch.load(path / ODE, weights_only=True) if (path / ODE).exists() else None
        logger.info("resumed step %d from %s", manifest.step, path)
        return manifest.step, ode_state

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


def _read_manifest(path: Path) -> Manifest | None:
    try:
        manifest = Manifest(**json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError):
        return None
    return manifest


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
