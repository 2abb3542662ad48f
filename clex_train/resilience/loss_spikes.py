"""Loss spikes: a step whose loss lies far above those before it, and the rows that are skipped because of one.

    spike:  loss > median + factor * MAD        over the last `window` losses, MAD = median |loss - median|

The median and the MAD do not move for a few outliers. State is plain numbers and goes into the checkpoint, so that a
resumed run decides as the uninterrupted one would have.
"""

import math
from statistics import median
from typing import Any

FEWEST = 10
"""Losses without which nothing is called a spike."""
LEAST_SPREAD = 1e-3
"""MAD as a share of the median that is assumed at least: a loss that hardly moves is no reason to see spikes."""


class SpikeWatch:
    """Detects spikes and keeps what was skipped for them: `skipped` are half-open ranges of places among the rows."""

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.losses: list[float] = []
        self.skipped: list[tuple[int, int]] = []
        self.roll_backs = 0

    def limit(self) -> float:
        """The loss above which a step is a spike; infinite while there are too few to compare with."""
        if len(self.losses) < min(FEWEST, self.window):
            return math.inf
        middle = median(self.losses)
        spread = median(abs(loss - middle) for loss in self.losses)
        return middle + self.factor * max(spread, LEAST_SPREAD * abs(middle))

    def is_spike(self, loss: float) -> bool:
        """Compare a loss with those before it and, unless it is a spike or not finite, remember it."""
        if loss > self.limit():
            return True
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-self.window :]
        return False

    def skip(self, places: list[int]) -> None:
        """Leave these rows out from now on, and count a roll-back."""
        ranges = sorted([*self.skipped, *((place, place + 1) for place in places)])
        merged = ranges[:1]
        for start, stop in ranges[1:]:
            if start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.skipped, self.roll_backs = merged, self.roll_backs + 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": self.losses, "skipped": self.skipped, "roll_backs": self.roll_backs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
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
