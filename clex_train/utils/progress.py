"""Progress display: a moving bar on a terminal, an occasional log line elsewhere."""

import io
import sys
from typing import Any

from tqdm import tqdm

from clex_train.utils import log

SECONDS_BETWEEN_REDRAWS = 0.5
SECONDS_BETWEEN_LINES = 15.0
LINE = "{desc}{percentage:.0f} %, {elapsed} so far, {remaining} left{postfix}"
UNKNOWN_TOTAL = "{desc}{n_fmt} {unit}, {elapsed} so far{postfix}"

logger = log.get(__name__)


class LogLines(tqdm):  # type: ignore[misc]  # tqdm has no annotations
    """A progress bar whose redraws are log lines; in a file, redrawing would be one endless line."""

    def __init__(self, **settings: Any) -> None:
        # tqdm writes control characters when it closes a bar; a string buffer swallows them.
        super().__init__(**settings, file=io.StringIO(), miniters=1)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Log the bar's text; tqdm calls this for every redraw, and with an empty text to clear the bar."""
        text = str(self) if msg is None else msg
        if text:
            logger.info("%s", text)
        return bool(text)


def bar(total: float | None, desc: str, *, is_shown: bool = True, **settings: Any) -> tqdm:
    """Create the progress bar of a task of `total` units, None if unknown; use it as a context manager.

    `settings` are tqdm's. Where standard error is not a terminal, a task shorter than `SECONDS_BETWEEN_LINES` logs
    nothing.
    """
    # A desc from a file name may hold terminal controls; the colon matches tqdm's `set_description`.
    shared = {"total": total, "desc": f"{log.printable(desc)}: ", "disable": not is_shown, **settings}
    if sys.stderr.isatty():
        return tqdm(**shared, dynamic_ncols=True, mininterval=SECONDS_BETWEEN_REDRAWS)
    shared["bar_format"] = UNKNOWN_TOTAL if total is None else LINE
    return LogLines(**shared, mininterval=SECONDS_BETWEEN_LINES, delay=SECONDS_BETWEEN_LINES)
