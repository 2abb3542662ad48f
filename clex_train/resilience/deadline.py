"""The deadline of `max_runtime`: stop early enough that the last checkpoint is still written before it."""

import time

import psutil


class Deadline:
    """The end of `max_runtime`; decides if a piece of work and the save after it still fit before it.

    The expected duration is `SLACK` times the longest of the last `MEMORY` measurements of its kind.
    """

    MEMORY = 20
    SLACK = 1.5

    def __init__(self, limit: float, started: float | None = None) -> None:
        """Set the limit: `limit` seconds after `started` (Unix time), by default the start of this process."""
        self.limit = limit
        # Not "now": imports and loading count against a scheduler's limit too.
        self.started = psutil.Process().create_time() if started is None else started
        self.margin = min(60.0, 0.02 * limit)
        self._assumed: dict[str, float] = {}
        self._measured: dict[str, list[float]] = {}

    def assume(self, kind: str, seconds: float) -> None:
        """Expect `seconds` for this kind of work until it has been measured; the default is 0."""
        self._assumed[kind] = seconds

    def took(self, kind: str, seconds: float) -> None:
        """Record how many seconds a `step`, an `evaluation` or a `save` took."""
        self._measured[kind] = [*self._measured.get(kind, []), seconds][-self.MEMORY :]

    def left(self) -> float:
        """Return the seconds until the limit; negative after it."""
        return self.started + self.limit - time.time()

    def exceeded_by(self, *ahead: str) -> str | None:
        """Return the reason to stop now instead of doing the work `ahead`, or None while it fits."""
        # A save always follows, or the work would be lost.
        needed = self.margin + sum(self._expected(kind) for kind in (*ahead, "save"))
        if self.left() > needed:
            return None
        return f"max_runtime ends in {max(0.0, self.left()):.0f} s"

    @property
    def has_measured(self) -> bool:
        """True once anything of the run has been timed."""
        return bool(self._measured)

    def _expected(self, kind: str) -> float:
        known = self._measured.get(kind)
        return self.SLACK * (max(known) if known else self._assumed.get(kind, 0.0))


class NoDeadline:
    """Stands in for `Deadline` in a run without `max_runtime`: everything fits."""

    has_measured = True

    def assume(self, kind: str, seconds: float) -> None:
        """Ignore an expectation."""

    def took(self, kind: str, seconds: float) -> None:
        """Ignore a measurement."""

    def exceeded_by(self, *ahead: str) -> str | None:
        """Return no reason to stop."""
        return None
