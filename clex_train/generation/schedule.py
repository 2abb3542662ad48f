"""The t of each call while a text grows: n tokens are read at the least t >= n / L of the frequency table.

The prompt of P tokens is one call of n = P. Each generated token is a call of its own, n = P + 1, P + 2, and so on.
Where t changes, cached keys are rotated to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch

from clex_train.scaling.frequency_table import Frequencies, FrequencyTable
from clex_train.scaling.spectrum import Spectrum

MOST_SHOWN = 6
"""Stretches that are listed; more are summarised."""


@dataclass(frozen=True)
class Stretch:
    """Lengths that are read with the same frequencies."""

    t: float
    first: int
    """Tokens, inclusive."""
    last: int
    """Tokens, inclusive."""


def stretches(table: FrequencyTable, context_len: int, num_prompt: int, max_new_tokens: int) -> list[Stretch]:
    """Split the lengths of all calls of a text into stretches of one spectrum each."""
    # The last token is only printed, so no call has its length.
    lengths = range(num_prompt, num_prompt + max_new_tokens)
    found: list[Stretch] = []
    before: Spectrum | None = None
    # The table returns the same object for the same t, so grouping needs no arithmetic.
    for _, group in groupby(lengths, key=lambda length: id(table.least_upper_bound(length, context_len))):
        members = list(group)
        spectrum = table.least_upper_bound(members[0], context_len)
        if before is not None and _is_same(before, spectrum):
            # Plain RoPE has the same frequencies at every t, whatever the grid calls them.
            found[-1] = Stretch(found[-1].t, found[-1].first, members[-1])
        else:
            found.append(Stretch(spectrum.t, members[0], members[-1]))
        before = spectrum
    return found


def describe(table: Frequencies, context_len: int, num_prompt: int, max_new_tokens: int) -> str:
    """Say which t is used for what lengths of the text, and when it changes."""
    if not isinstance(table, FrequencyTable):
        return f"the model's own RoPE ({table.method}) follows the length by itself"
    found = stretches(table, context_len, num_prompt, max_new_tokens)
    if len(found) == 1:
        return _constant(table, found[0], context_len)
    if len(found) > MOST_SHOWN:
        first, last = found[0], found[-1]
        return (
            f"from {first.t:g} at {first.first:,} tokens to {last.t:g} at {last.first:,}, in {len(found) - 1} changes"
        )
    parts = [f"{found[0].t:g} from {found[0].first:,} tokens"]
    parts += [f"{each.t:g} from {each.first:,} (after {each.first - num_prompt:,} new ones)" for each in found[1:]]
    return ", ".join(parts)


def _constant(table: FrequencyTable, only: Stretch, context_len: int) -> str:
    if _is_same(table.at(1.0), table.at(table.t_max)):
        return "the same frequencies at every length"
    return f"{only.t:g} up to {only.last:,} tokens, no change"


def _is_same(one: Spectrum, other: Spectrum) -> bool:
    return torch.equal(one.inv_freq, other.inv_freq) and one.attention_factor == other.attention_factor
