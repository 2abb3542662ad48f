"""Checkpoints of a run: DeepSpeed's sharded engine state, the ODE's state and the step, complete or not there at all.

    checkpoints/step_<N>/    DeepSpeed's files, `ode.pt`, `config.yaml`, `manifest.json`
    checkpoints/latest       the name of the newest complete one

A checkpoint is written into `saving_step_<N>`, flushed to disk and renamed when every rank has finished, then `latest`
is replaced. A folder whose files are not those of its manifest is damaged: it is named, and passed over or refused.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clex_train.checkpoint import manifest, safe_load, universal
from clex_train.checkpoint.manifest import Manifest
from clex_train.checkpoint.safe_load import RunsCode, without_code
from clex_train.checkpoint.writer import BackgroundWriter, DirectWriter, Writer, Written, writing_with
from clex_train.config.checkpoint import CheckpointConfig, OnFullDisk
from clex_train.config.recorded import CONFIG
from clex_train.utils import distributed, files, log
from clex_train.utils.checksums import Damaged
from clex_train.utils.errors import NO_ROOM, ConfigError, RunStopped, first_line
from clex_train.utils.files import BadFile, make_folder, read_regular, sync_directory, write_atomically
from clex_train.utils.protocols import Engine

logger = log.get(__name__)

ODE, LATEST = "ode.pt", "latest"
MOST_NAME = 256
"""Bytes of `latest`."""
MOST_DIGITS = 18
"""Of a step; Python refuses to read integers of thousands."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files have the right sizes."""

    path: Path
    manifest: Manifest

    def config(self) -> Path | None:
        """Find its copy of the run's configuration, if it has a whole one; earlier versions kept none."""
        try:
            whole = files.sha256(self.path / CONFIG, within=self.path) == self.manifest.sha256.get(CONFIG)
        except (OSError, BadFile):
            return None
        return self.path / CONFIG if whole else None


@dataclass
class _Pending:
    """A save that is being written."""

    step: int
    rows_consumed: int
    beside: Path
    started: float


class Checkpoints:
    """The checkpoints of one run folder.

    `strict` refuses a folder in which something newer than the newest good one is damaged, instead of passing it over.
    `config` is the text of the run's configuration, of which every checkpoint keeps a copy.
    Raises `ValueError` on creation, naming what differs, when the newest one belongs to another model or data.
    """

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
        """The newest one whose files have the right sizes, or None. Files only; every rank may call it alone."""
        return max(self._list()[0], key=lambda found: found.manifest.step, default=None)

    def describe_newest(self) -> str:
        """Describe where a stopped run stands."""
        found = self.newest()
        return f"the last checkpoint is {found.path}" if found else "there is no checkpoint yet"

    def save(self, engine: Engine, ode_state: dict[str, Any] | None, step: int, rows_consumed: int) -> float:
        """Begin a checkpoint, or write it whole without `overlap`; the seconds that training waited. Collective.

        Raises `RunStopped` when it cannot be written; earlier checkpoints and `latest` are then as they were.
        """
        started = time.perf_counter()
        self.finish()
        beside = self.folder / f"saving_step_{step}"
        if not self._agree(_attempt(lambda: _make_room(beside)) if distributed.is_main() else None, beside):
            return time.perf_counter() - started
        with writing_with(engine, self._writer):
            engine.save_checkpoint(str(self.folder), tag=beside.name, save_latest=False)
        if distributed.is_main() and ode_state is not None:
            self._writer.save(ode_state, beside / ODE)
        self._pending = _Pending(step, rows_consumed, beside, started)
        if not self.settings.overlap:
            self.finish()
        return time.perf_counter() - started

    def poll(self) -> float | None:
        """`finish` if every rank has done its part, else nothing. Collective."""
        if self._pending is None or distributed.any_rank(not self._writer.done()):
            return None
        return self.finish()

    def finish(self) -> float | None:
        """Wait for the checkpoint that is being written and publish it; None if there is none. Collective.

        Returns the seconds from the beginning of its save to the last byte. Raises `RunStopped` as `save` does.
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
        if self._agree(failure, pending.beside) and distributed.is_main():
            logger.info("checkpoint of step %d is complete after %.1f s", pending.step, seconds)
        return seconds

    def choose(self) -> Found | None:
        """Choose the newest checkpoint all of whose files have their SHA-256, each read by one rank. Collective.

        Raises `ValueError` when there are only damaged ones; with `strict`, when a newer thing than it is damaged; when
        the ranks do not see the same files.
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
            logger.info("verified %s in %.1f s", chosen.path, _since(started))
            # Not before: those that surplus ones would give way to have been verified now.
            self.retire(chosen.manifest.step)
        self._chosen = chosen
        return chosen

    def tidy(self) -> None:
        """Remove what interrupted saves and conversions left, and finish a replacing of `latest`; on one rank."""
        self._complete_latest()
        files.temporary_path(self.folder / LATEST).unlink(missing_ok=True)
        for leftover in [*self.folder.glob("saving_step_*"), *self.folder.glob(f"{files.REMOVING}*")]:
            files.remove_folder(leftover)
        universal.discard(self.folder)

    def retire(self, newest: int) -> None:
        """Remove the checkpoints up to step `newest` that are kept no longer; on one rank."""
        every = self.settings.keep_every
        complete = sorted((found.manifest.step, found.path) for found in self._list()[0])
        complete = [each for each in complete if each[0] <= newest]
        for step, path in complete[: -self.settings.keep_last]:
            if not every or step % every:
                files.remove_folder(path)

    def load(
        self, engine: Engine, interrupted: Callable[[], bool] | None = None
    ) -> tuple[int, dict[str, Any] | None] | None:
        """Continue the checkpoint of `choose`: (step, ODE state), or None when there is none. Collective.

        One written by another number of ranks is converted: `StopRequested` when `interrupted` says so meanwhile on a
        rank. `ValueError` as from `choose`, for one that cannot be converted, and for one whose files would run code.
        """
        self.finish()
        found, self._chosen = self._chosen or self.choose(), None
        if found is None:
            return None
        with without_code(found.path):
            if self._fits_ranks(found):
                loaded, _ = engine.load_checkpoint(str(self.folder), tag=found.path.name)
            else:
                loaded = self._load_converted(engine, found, interrupted)
            ode_state = torch.load(found.path / ODE, weights_only=True) if ODE in found.manifest.files else None
        assert loaded is not None, f"DeepSpeed found nothing in {found.path}"
        logger.info("resumed step %d from %s", found.manifest.step, found.path)
        return found.manifest.step, ode_state

    def _fits_ranks(self, found: Found) -> bool:
        """Tell whether as many ranks wrote it, or each of them held everything."""
        return found.manifest.world_size == distributed.world_size() or found.manifest.zero_stage == 0

    def _load_converted(self, engine: Engine, found: Found, interrupted: Callable[[], bool] | None) -> Any:
        folder = universal.convert(found.path, interrupted)
        with universal.universal_loading(engine):
            loaded, _ = engine.load_checkpoint(str(folder), tag=found.path.name)
        distributed.barrier()
        if distributed.is_main():
            universal.discard(self.folder)
        return loaded

    def _list(self) -> tuple[list[Found], dict[Path, str]]:
        """List checkpoints with files of the right sizes, and what is wrong with the others."""
        return _list(self.folder)

    def _verify(self, found: Found) -> str | None:
        """Find what is wrong with its contents, or None. The ranks share the files; `RunsCode` is on every rank."""
        names = sorted(found.manifest.files, key=lambda name: -found.manifest.files[name])
        said = distributed.gather_objects(_wrong(found, names[distributed.rank() :: distributed.world_size()]))
        for refusal in said:
            if isinstance(refusal, RunsCode):
                raise refusal
        return next((reason for reason in said if isinstance(reason, str)), None)

    def _judge(self, chosen: Found | None, damage: dict[Path, str]) -> None:
        """Warn of what is damaged and newer than the chosen one, or refuse to go on."""
        newer = {path: why for path, why in damage.items() if _step(path) > (chosen.manifest.step if chosen else -1)}
        if chosen is not None and (why := self._latest_is_wrong(chosen, newer)):
            newer[self.folder / LATEST] = why
        said = "; ".join(f"checkpoint {path} is damaged: {why}" for path, why in sorted(newer.items()))
        if newer and chosen is None:
            raise ConfigError(
                f"{said}; no older one is left", None, "remove it to start again, or choose another output_dir"
            )
        if newer and self.strict:
            raise ConfigError(
                "resume", "strict", f"{said}; resume=auto would continue {chosen.path if chosen else None}"
            )
        if newer and distributed.is_main():
            logger.warning("%s; %s is continued instead", said, chosen.path if chosen else None)

    def _latest_is_wrong(self, chosen: Found, newer: dict[Path, str]) -> str | None:
        """Nothing is loaded by what `latest` says, but a reader may go by it."""
        try:
            named = read_regular(self.folder / LATEST, within=self.folder, most=MOST_NAME)
        except FileNotFoundError:
            return "it is missing"
        except BadFile as error:
            return error.reason
        newest = max([chosen.path, *newer], key=_step)
        return None if named == f"{newest.name}\n".encode() else f"it does not name {newest.name}"

    def _require_same(self, names: list[str]) -> None:
        if distributed.any_rank(names != distributed.broadcast_object(names)):
            raise ConfigError(
                "output_dir",
                self.folder.parent,
                "the ranks see different checkpoints; it must be on a file system that all nodes share",
            )

    def _agree(self, failure: Exception | None, beside: Path) -> bool:
        """True when no rank failed. Otherwise the partial folder is removed, and the run stops or goes on."""
        failures = [failed for failed in distributed.gather_objects(failure) if failed is not None]
        if not failures:
            return True
        if distributed.is_main():
            files.remove_folder(beside)
        full = all(isinstance(failed, OSError) and failed.errno in NO_ROOM for failed in failures)
        why = f"checkpoint {beside}: cannot be written ({first_line(failures[0])}); earlier ones are intact"
        if full and self.settings.on_full_disk is OnFullDisk["continue"]:
            if distributed.is_main():
                logger.error("%s; training goes on without it (checkpoint.on_full_disk=continue)", why)
            return False
        raise RunStopped(f"{why}: make room and run the same command again") from failures[0]

    def _publish(self, pending: _Pending, written: dict[str, Written]) -> None:
        """Make a written folder the newest checkpoint; on one rank."""
        final = self.folder / f"step_{pending.step}"
        if self.config:
            write_atomically(pending.beside / CONFIG, self.config)
            content = self.config.encode()
            written[CONFIG] = Written(len(content), hashlib.sha256(content).hexdigest())
        whole = replace(
            self.identity,
            step=pending.step,
            rows_consumed=pending.rows_consumed,
            files={name: what.size for name, what in sorted(written.items())},
            sha256={name: what.sha256 for name, what in sorted(written.items())},
        )
        write_atomically(pending.beside / manifest.MANIFEST, whole.render().encode())
        files.remove_folder(final)
        pending.beside.rename(final)
        sync_directory(self.folder)
        write_atomically(self.folder / LATEST, f"{final.name}\n".encode())
        self.retire(pending.step)

    def _complete_latest(self) -> None:
        """Let `latest` name the newest checkpoint where a kill came between its renaming and that of `latest`.

        Then it names the one before, which is there until `latest` is replaced; it is missing beside the first; or it
        names one that was about to be replaced. Anything else is damage, which `choose` judges.
        """
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


def newest_config(run_dir: Path) -> Path | None:
    """Find the newest checkpoint's copy of its run's configuration, if it has a whole one; files only."""
    newest = max(_list(run_dir / "checkpoints")[0], key=lambda found: found.manifest.step, default=None)
    return newest.config() if newest else None


def _list(folder: Path) -> tuple[list[Found], dict[Path, str]]:
    good, damage = [], {}
    for path in folder.glob("step_*"):
        try:
            good.append(Found(path, manifest.read(path)))
        except Damaged as damaged:
            damage[path] = str(damaged)
    return good, damage


def _attempt(action: Any) -> Any:
    """The action's result, or the error of the disk that kept it from one."""
    try:
        return action()
    except (OSError, RuntimeError) as error:
        return error


def _wrong(found: Found, names: list[str]) -> str | RunsCode | None:
    """Find what is wrong with some files of a checkpoint, or None."""
    try:
        manifest.check_contents(found.path, found.manifest, names)
        with without_code(found.path):
            reasons = [safe_load.check(found.path / name) for name in names if name.endswith(".pt")]
    except Damaged as damaged:
        return str(damaged)
    except RunsCode as refusal:
        return refusal
    return next((reason for reason in reasons if reason is not None), None)


def _make_room(beside: Path) -> None:
    files.remove_folder(beside)
    make_folder(beside)


def _step(path: Path) -> int:
    """The step in a checkpoint's name; a name without one counts as the newest."""
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() and len(digits) <= MOST_DIGITS else 2**62


def _since(started: float) -> float:
    return time.perf_counter() - started
