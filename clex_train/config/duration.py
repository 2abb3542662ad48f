"""Durations in the forms that people and SLURM use: hours, or [days-]hours:minutes:seconds."""

from __future__ import annotations

import re

from clex_train.utils.errors import require

LONGEST_HOURS = 24 * 366
_CLOCK = re.compile(r"(?:(\d{1,9})-)?(\d{1,9}):([0-5]\d):([0-5]\d)")
_HOURS = re.compile(r"\d+(\.\d*)?|\.\d+")


def seconds(key: str, value: str) -> float:
    """Convert `value` to seconds; raise `ConfigError` naming `key` unless it is above 0 and below a year."""
    clock, total = _CLOCK.fullmatch(value.strip()), -1.0
    if clock:
        days, hours, minutes, rest = (int(part or 0) for part in clock.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    elif _HOURS.fullmatch(value.strip()):
        total = float(value) * 3600
    # YAML 1.1 reads 23:30:00 without quotes as sexagesimal seconds (84600), which as hours would be years.
    require(
        0 < total <= LONGEST_HOURS * 3600,
        key,
        value,
        "a number of hours, or [days-]hours:minutes:seconds (in quotes within a YAML file)",
    )
    return total
