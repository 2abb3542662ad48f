"""Kill a program at each of its crash points and compare the result of the next launch with an undisturbed run."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.warm_processes import Program

TESTS = Path(__file__).resolve().parent
SCRIPT = str(TESTS / "crash_points.py")
Contents = dict[str, Any]


@dataclass
class Crashing:
    """A program that only writes below `place`, which `prepare` fills before a trial.

    `contents` returns by name the parts that must equal those of an undisturbed run.
    """

    command: list[str]
    place: Path
    contents: Callable[[Path], Contents]
    prepare: Callable[[], object] = lambda: None
    missed: int = 0
    """Number of launches that ended before their crash point."""
    failures: list[str] = field(default_factory=list)

    def check_all(self, every: int, strict_every: int = 0) -> None:
        """Kill at each `every`-th point; at each `strict_every`-th of these also resume with `resume=strict`."""
        count, whole = self._undisturbed()
        tried = range(1, count + 1, every)
        for index, at in enumerate(tried):
            self._check(at, whole, ["resume=strict"] if strict_every and index % strict_every == 0 else [])
        print(f"\n{len(tried)} of {count} crash points tried, {self.missed} not met; {len(self.failures)} failures")
        assert not self.failures, "\n".join(self.failures)

    def launch(self, at: int) -> subprocess.CompletedProcess[str]:
        """Run the program to crash point `at`, or to its end for 0."""
        return Program([SCRIPT, *self.command], **self.watching(at)).end()

    def is_killed(self, launch: subprocess.CompletedProcess[str]) -> bool:
        """Return True if a launch was killed at its crash point."""
        return launch.returncode == -9

    def watching(self, at: int) -> dict[str, str]:
        """Return the environment variables that crash_points.py reads."""
        return {"CRASH_ROOT": str(self.place), "CRASH_LOG": str(self._log), "CRASH_AT": str(at)}

    def points(self) -> list[str]:
        """Return the crash points of the last launch; of several processes, those of the one with most."""
        lines = [line.partition(" ") for line in self._log.read_text().splitlines()]
        by_process = {number: [point for each, _, point in lines if each == number] for number, _, _ in lines}
        return max(by_process.values(), key=len, default=[])

    @property
    def _log(self) -> Path:
        return self.place.with_suffix(".log")

    def _begin(self) -> None:
        self._log.write_text("")
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        self.prepare()

    def _undisturbed(self) -> tuple[int, Contents]:
        self._begin()
        done = self.launch(0)
        assert done.returncode == 0, done.stderr
        return len(self.points()), self.contents(self.place)

    def _check(self, at: int, whole: Contents, strict: list[str]) -> None:
        """Kill it at a point and run it again; repeat from the same state with the overrides of `strict`."""
        self._begin()
        killed = self.launch(at)
        where = f"{at}: {self.points()[at - 1 :]}"
        if not self.is_killed(killed):
            self.missed += 1
            self._require(killed.returncode == 0, f"{where}: code {killed.returncode}: {killed.stderr}")
        left = self.place.with_suffix(".left")
        if strict:
            shutil.copytree(self.place, left)
        self._resume_and_compare(where, whole)
        if strict:
            shutil.rmtree(self.place)
            left.rename(self.place)
            self._resume_and_compare(f"{where} {' '.join(strict)}", whole, strict)

    def _resume_and_compare(self, where: str, whole: Contents, overrides: Iterable[str] = ()) -> None:
        done = Program([*self.command, *overrides]).end()
        said = done.stdout + done.stderr
        self._require(done.returncode == 0, f"{where}: code {done.returncode}: {said}")
        for word in ("Traceback", "damaged"):
            self._require(word not in said, f"{where}: {said}")
        found = self.contents(self.place)
        self._require(found.keys() <= whole.keys(), f"{where}: left over {sorted(found.keys() - whole.keys())}")
        differ = [name for name in whole if name not in found or found[name] != whole[name]]
        self._require(not differ, f"{where}: missing or different {differ}")

    def _require(self, holds: bool, failure: str) -> None:
        if not holds:
            print(failure, flush=True)
            self.failures.append(failure)


class CrashingWorker(Crashing):
    """Kill a worker process in place of the program, which must end with a line about it."""

    def launch(self, at: int) -> subprocess.CompletedProcess[str]:
        """Run it until a worker reaches crash point `at`, counted per worker."""
        hook = self.place.with_name("hook")
        hook.mkdir(exist_ok=True)
        # Workers are fresh interpreters, unlike the program, and need a hook to watch them.
        (hook / "sitecustomize.py").write_text("import crash_points\ncrash_points.watch()\n")
        path = os.pathsep.join(map(str, (hook, TESTS, TESTS.parent)))
        return Program(self.command, **self.watching(at), PYTHONPATH=path).end()

    def is_killed(self, launch: subprocess.CompletedProcess[str]) -> bool:
        """Return True if the program noticed the kill."""
        return launch.returncode == 2 and "a worker was killed" in launch.stderr
