"""Atomic, verified checkpoints of a run: DeepSpeed's sharded state, the ODE's state and the step.

    checkpoints/step_<N>/    DeepSpeed's files, `ode.pt`, `config.yaml`, `manifest.json`
    checkpoints/latest       the name of the newest complete checkpoint

Files are staged in `saving_step_<N>`, flushed, and the folder is renamed once every rank has finished; then `latest` is
replaced. A folder that does not match its manifest is damaged: it is reported, and skipped or refused.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clex_train.checkpoint import manifest, universal
from clex_train.checkpoint.listing import Found, damage_in, list_checkpoints, step_of
from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.safe_load import RunsCode, tensors_only
from clex_train.checkpoint.writer import BackgroundWriter, DirectWriter, Writer, Written, writing_with
from clex_train.config.checkpoint import CheckpointConfig, OnFullDisk
from clex_train.tracking.saved_config import CONFIG
from clex_train.utils import distributed, files, log
from clex_train.utils.errors import NO_ROOM, ConfigError, RunStopped, first_line
from clex_train.utils.files import BadFile, make_empty, read_regular, sync_directory, write_atomically
from clex_train.utils.protocols import Engine

logger = log.get(__name__)

ODE, LATEST = "ode.pt", "latest"
MOST_NAME = 256
"""Largest `latest` that is read, in bytes."""


@dataclass
class _Pending:
    """A save that is still being written."""

    step: int
    rows_consumed: int
    staging: Path
    started: float
    """From `time.perf_counter`."""


class Checkpoints:
    """The checkpoints of one run folder.

    With `strict`, damage newer than the newest good checkpoint is an error instead of a warning. `config` is the text
    of the run's configuration; every checkpoint keeps a copy. Raises `ConfigError` on creation, naming the difference,
    when the newest checkpoint belongs to another model or other data.
    """

    ode_file = ODE
    """Name of the file with the ODE's state in a checkpoint."""

    def __init__(
        self, run_dir: Path, settings: CheckpointConfig, identity: Manifest, strict: bool = False, config: str = ""
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self.settings = settings
        self.identity = identity
        self.strict = strict
        self.config = config
        self._writer: Writer = BackgroundWriter() if settings.overlap else DirectWriter()
        self._pending: _Pending | None = None
        self._chosen: Found | None = None
        if found := self.newest():
            manifest.check_compatible(found.path, found.manifest, identity)

    def newest(self) -> Found | None:
        """Return the newest checkpoint whose files have the right sizes, or None. Not collective."""
        return max(self._list()[0], key=lambda found: found.manifest.step, default=None)

    def describe_newest(self) -> str:
        """Describe the checkpoint from which a stopped run will resume."""
        found = self.newest()
        return f"the last checkpoint is {found.path}" if found else "there is no checkpoint yet"

    def save(self, engine: Engine, ode_state: dict[str, Any] | None, step: int, rows_consumed: int) -> float:
        """Start a checkpoint and return the seconds that training waited; without `overlap`, finish it. Collective.

        Raises `RunStopped` when it cannot be written; earlier checkpoints and `latest` are then unchanged.
        """
        started = time.perf_counter()
        # At most one save in flight: two copies of the optimizer state would not fit in host memory.
        self.finish()
        staging = self.folder / f"saving_step_{step}"
        if not self._all_succeeded(_attempt(lambda: make_empty(staging)) if distributed.is_main() else None, staging):
            return time.perf_counter() - started
        with writing_with(engine, self._writer):
            # DeepSpeed would replace its own `latest` here, before other ranks have written their files.
            engine.save_checkpoint(str(self.folder), tag=staging.name, save_latest=False)
        # The ODE is replicated, so one copy is enough.
        if distributed.is_main() and ode_state is not None:
            self._writer.save(ode_state, staging / ODE)
        self._pending = _Pending(step, rows_consumed, staging, started)
        if not self.settings.overlap:
            self.finish()
        return time.perf_counter() - started

    def poll(self) -> float | None:
        """Finish a pending save if every rank has written its files, else return None at once. Collective."""
        # Every rank has the same `_pending`, so all of them skip the collective or none does.
        if self._pending is None or distributed.any_rank(not self._writer.done()):
            return None
        return self.finish()

    def finish(self) -> float | None:
        """Wait for the pending save and publish it. Collective.

        Returns the seconds from the start of the save to the last byte, or None without a pending save. Raises
        `RunStopped` as `save` does.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        outcome: Any = _attempt(self._writer.wait)
        seconds = max(distributed.gather_objects(self._writer.ended - pending.started))
        outcomes = distributed.gather_objects(outcome)
        failures = [failed for failed in outcomes if isinstance(failed, OSError | RuntimeError)]
        failure = failures[0] if failures else None
        if failure is None and distributed.is_main():
            written = {name: what for part in outcomes for name, what in part.items()}
            failure = _attempt(lambda: self._publish(pending, written))
        if self._all_succeeded(failure, pending.staging) and distributed.is_main():
            logger.info("checkpoint of step %d written in %.1f s", pending.step, seconds)
        return seconds

    def choose(self) -> Found | None:
        """Find the newest checkpoint whose files all match their SHA-256. Collective; ranks share the hashing.

        Raises `ConfigError` when every checkpoint is damaged, when ranks see different files, and with `strict` when a
        newer checkpoint is damaged.
        """
        started = time.perf_counter()
        if distributed.is_main():
            self.tidy()
        good, damage = self._list()
        good.sort(key=lambda found: -found.manifest.step)
        self._require_same([found.path.name for found in good])
        chosen = None
        for found in good:
            reason = self._verify(found)
            if reason is None:
                chosen = found
                break
            damage[found.path] = reason
        self._judge(chosen, damage)
        if chosen and distributed.is_main():
            logger.info("verified %s in %.1f s", chosen.path, time.perf_counter() - started)
            # Only now: before verification, the checkpoint kept could be damaged and the one removed good.
            self.retire(chosen.manifest.step)
        self._chosen = chosen
        return chosen

    def tidy(self) -> None:
        """Clean up after interrupted saves and conversions. Call it on one rank."""
        self._complete_latest()
        files.temporary_path(self.folder / LATEST).unlink(missing_ok=True)
        for leftover in [*self.folder.glob("saving_step_*"), *self.folder.glob(f"{files.REMOVING}*")]:
            files.remove_folder(leftover)
        universal.discard(self.folder)

    def retire(self, newest: int) -> None:
        """Remove surplus checkpoints up to step `newest`, by `keep_last` and `keep_every`. Call it on one rank."""
        every = self.settings.keep_every
        complete = sorted((found.manifest.step, found.path) for found in self._list()[0])
        # Newer ones are damaged or were not verified; they stay for the user to look at.
        complete = [each for each in complete if each[0] <= newest]
        for step, path in complete[: -self.settings.keep_last]:
            if not every or step % every:
                files.remove_folder(path)

    def load(
        self, engine: Engine, interrupted: Callable[[], bool] | None = None
    ) -> tuple[int, dict[str, Any] | None] | None:
        """Load the newest good checkpoint into `engine`. Collective.

        Returns (step, ODE state), or None without a checkpoint. One written by another number of ranks is converted
        first. Raises `StopRequested` when `interrupted` becomes true on a rank meanwhile, and `InputError` as `choose`
        does, when the conversion fails or when a file would run code.
        """
        self.finish()
        found, self._chosen = self._chosen or self.choose(), None
        if found is None:
            return None
        with tensors_only(found.path):
            if self._fits_ranks(found):
                loaded, _ = engine.load_checkpoint(str(self.folder), tag=found.path.name)
            else:
                loaded = self._load_converted(engine, found, interrupted)
            ode_state = torch.load(found.path / ODE, weights_only=True) if ODE in found.manifest.files else None
        assert loaded is not None, f"DeepSpeed found nothing in {found.path}"
        logger.info("resumed step %d from %s", found.manifest.step, found.path)
        return found.manifest.step, ode_state

    def _fits_ranks(self, found: Found) -> bool:
        """Return True if this number of ranks can load a checkpoint without conversion."""
        # Without ZeRO the state is replicated, and any number of ranks can load it.
        return found.manifest.world_size == distributed.world_size() or found.manifest.zero_stage == 0

    def _load_converted(self, engine: Engine, found: Found, interrupted: Callable[[], bool] | None) -> Any:
        folder = universal.convert(found.path, interrupted)
        with universal.universal_loading(engine):
            loaded, _ = engine.load_checkpoint(str(folder), tag=found.path.name)
        # A slow rank may still be reading.
        distributed.barrier()
        if distributed.is_main():
            universal.discard(self.folder)
        return loaded

    def _list(self) -> tuple[list[Found], dict[Path, str]]:
        """List the checkpoints with files of the right sizes, and the damage of the others by path."""
        return list_checkpoints(self.folder)

    def _verify(self, found: Found) -> str | None:
        """Return the damage in a checkpoint's files, or None; ranks share the hashing. Raises `RunsCode` on all ranks.

        Collective.
        """
        # Largest first and then round robin, which balances the bytes per rank well enough.
        names = sorted(found.manifest.files, key=lambda name: -found.manifest.files[name])
        reports = distributed.gather_objects(damage_in(found, names[distributed.rank() :: distributed.world_size()]))
        # A file that would run code is an attack, not damage: never fall back to an older checkpoint.
        for refusal in reports:
            if isinstance(refusal, RunsCode):
                raise refusal
        return next((reason for reason in reports if isinstance(reason, str)), None)

    def _judge(self, chosen: Found | None, damage: dict[Path, str]) -> None:
        """Warn about damage newer than the chosen checkpoint, or raise `ConfigError`."""
        # Damage older than the chosen checkpoint costs nothing and is not reported.
        newer = {path: why for path, why in damage.items() if step_of(path) > (chosen.manifest.step if chosen else -1)}
        if chosen is not None and (why := self._latest_is_wrong(chosen, newer)):
            newer[self.folder / LATEST] = why
        faults = "; ".join(f"checkpoint {path} is damaged: {why}" for path, why in sorted(newer.items()))
        if newer and chosen is None:
            raise ConfigError(
                f"{faults}; no older one is left", None, "remove it to start again, or choose another output_dir"
            )
        if newer and self.strict:
            raise ConfigError(
                "resume", "strict", f"{faults}; resume=auto would resume {chosen.path if chosen else None}"
            )
        if newer and distributed.is_main():
            logger.warning("%s; resuming from %s instead", faults, chosen.path if chosen else None)

    def _latest_is_wrong(self, chosen: Found, newer: dict[Path, str]) -> str | None:
        """Return the damage of `latest`, or None."""
        # Nothing here is loaded by `latest`, but users and other tools read it.
        try:
            named = read_regular(self.folder / LATEST, within=self.folder, most=MOST_NAME)
        except FileNotFoundError:
            return "it is missing"
        except BadFile as error:
            return error.reason
        newest = max([chosen.path, *newer], key=step_of)
        return None if named == f"{newest.name}\n".encode() else f"it does not name {newest.name}"

    def _require_same(self, names: list[str]) -> None:
        if distributed.any_rank(names != distributed.broadcast_object(names)):
            raise ConfigError(
                "output_dir",
                self.folder.parent,
                "the ranks see different checkpoints; it must be on a file system that all nodes share",
            )

    def _all_succeeded(self, failure: Exception | None, staging: Path) -> bool:
        """Return True when no rank failed; else remove the partial save, then stop the run or return False.

        Collective.
        """
        failures = [failed for failed in distributed.gather_objects(failure) if failed is not None]
        if not failures:
            return True
        if distributed.is_main():
            files.remove_folder(staging)
        full = all(isinstance(failed, OSError) and failed.errno in NO_ROOM for failed in failures)
        why = f"checkpoint {staging}: cannot be written ({first_line(failures[0])}); earlier ones are intact"
        if full and self.settings.on_full_disk is OnFullDisk["continue"]:
            if distributed.is_main():
                logger.error("%s; training continues without it (checkpoint.on_full_disk=continue)", why)
            return False
        raise RunStopped(f"{why}: make room and run the same command again") from failures[0]

    def _publish(self, pending: _Pending, written: dict[str, Written]) -> None:
        """Turn a staged folder into the newest checkpoint. Call it on one rank."""
        final = self.folder / f"step_{pending.step}"
        if self.config:
            write_atomically(pending.staging / CONFIG, self.config)
            content = self.config.encode()
            written[CONFIG] = Written(len(content), hashlib.sha256(content).hexdigest())
        whole = replace(
            self.identity,
            step=pending.step,
            rows_consumed=pending.rows_consumed,
            files={name: what.size for name, what in sorted(written.items())},
            sha256={name: what.sha256 for name, what in sorted(written.items())},
        )
        # The manifest comes last: a folder without one is never taken for a checkpoint.
        write_atomically(pending.staging / manifest.MANIFEST, whole.render().encode())
        # An earlier checkpoint of the same step, after a rollback; rename does not replace a folder with files.
        files.remove_folder(final)
        pending.staging.rename(final)
        # Without an fsync of the parent, a power cut can undo the rename and keep the new `latest`.
        sync_directory(self.folder)
        write_atomically(self.folder / LATEST, f"{final.name}\n".encode())
        self.retire(pending.step)

    def _complete_latest(self) -> None:
        """Update `latest` after a kill between the rename of a checkpoint and that of `latest`."""
        good, damage = self._list()
        names = [found.path.name for found in sorted(good, key=lambda found: -found.manifest.step)]
        if not names or damage:
            return
        latest = self.folder / LATEST
        try:
            named = read_regular(latest, within=self.folder, most=MOST_NAME)
        except FileNotFoundError:
            named = None
        except BadFile:
            return
        # After such a kill, `latest` names the previous checkpoint, is missing if there is only the first one, or names
        # one that was about to be replaced. Any other content is damage, which `choose` reports.
        before = f"{names[1]}\n".encode() if len(names) > 1 else None
        if named == before or self._was_being_replaced(named):
            write_atomically(latest, f"{names[0]}\n")

    def _was_being_replaced(self, named: bytes | None) -> bool:
        found = re.fullmatch(rb"(step_\d+)\n", named or b"")
        name = found[1].decode() if found else ""
        prefixes = (files.SAVING, files.REMOVING)
        return (
            bool(name)
            and not (self.folder / name).exists()
            and any((self.folder / f"{prefix}{name}").exists() for prefix in prefixes)
        )


def _attempt(action: Any) -> Any:
    """Return the action's result, or its error as a value that other ranks can be sent."""
    try:
        return action()
    except (OSError, RuntimeError) as error:
        return error
