"""Loss spike detection, and the ranges of rows that are skipped because of spikes.

    spike:  loss > median + factor * MAD        over the last `window` losses, MAD = median |loss - median|

The state is plain numbers in the checkpoint, so a resumed run decides exactly as an uninterrupted one.
"""

import math
from statistics import median
from typing import Any

FEWEST = 10
"""Number of losses needed before anything counts as a spike."""
LEAST_SPREAD = 1e-3
"""Lower bound of the MAD, as a share of the median, so that a nearly constant loss does not make noise a spike."""


class SpikeWatch:
    """Detects spikes and records the skipped rows: `skipped` are half-open ranges of positions in the row order."""

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.losses: list[float] = []
        self.skipped: list[tuple[int, int]] = []
        self.roll_backs = 0

    def limit(self) -> float:
        """Return the loss above which a step is a spike; infinite while there are too few losses to compare with."""
        # A window shorter than FEWEST could never fill up to it.
        if len(self.losses) < min(FEWEST, self.window):
            return math.inf
        # Unlike mean and standard deviation, median and MAD barely move for a few outliers.
        middle = median(self.losses)
        spread = median(abs(loss - middle) for loss in self.losses)
        return middle + self.factor * max(spread, LEAST_SPREAD * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Return True if a loss is a spike; otherwise add it to the window if it is finite."""
        # Spikes stay out of the window, or a long one would become the new normal. NaN compares false here.
        if loss > self.limit():
            return True
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-self.window :]
        return False

    def skip(self, places: list[int]) -> None:
        """Skip these rows from now on, and count a rollback."""
        # Merged, since the data order looks them up on every row.
        ranges = sorted([*self.skipped, *((place, place + 1) for place in places)])
        merged = ranges[:1]
        for start, stop in ranges[1:]:
            if start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.skipped, self.roll_backs = merged, self.roll_backs + 1

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"losses": self.losses, "skipped": self.skipped, "roll_backs": self.roll_backs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.losses = list(state["losses"])
        self.skipped = [(start, stop) for start, stop in state["skipped"]]
        self.roll_backs = state["roll_backs"]


class NoSpikeWatch:
    """Stands in for `SpikeWatch` in a run without `optim.spike_factor`: no loss is a spike."""

    def __init__(self) -> None:
        self.skipped: list[tuple[int, int]] = []
        self.roll_backs = 0

    def limit(self) -> float:
        """Return infinity."""
        return math.inf

    def is_spike(self, loss: float) -> bool:
        """Take no loss for a spike."""
        return False

    def skip(self, places: list[int]) -> None:
        """Refuse: nothing but a spike leads here."""
        raise AssertionError("rows are skipped for spikes alone")

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, of which checkpoints have no entry."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state of a run that was launched with a spike watch."""
