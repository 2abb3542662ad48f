"""Search for the key tokens of a window set under an evaluator (`evaluation.key_tokens` has the definition)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from clex_train.config.evaluation import Protocol
from clex_train.evaluation import key_tokens
from clex_train.evaluation.grid import cells
from clex_train.evaluation.perplexity import one_shot
from clex_train.evaluation.protocols import Reading, spans_at
from clex_train.evaluation.runner import BAR, Feeding, bounded_memory, keeping_table, token_nll, work_of
from clex_train.resilience.oom_recovery import REMEDIES
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import Frequencies
from clex_train.utils import distributed, progress
from clex_train.utils.errors import RunStopped

if TYPE_CHECKING:
    from clex_train.evaluation.windows import WindowSet


def find(
    model: nn.Module,
    handle: RotaryHandle,
    tables: Mapping[str, Frequencies],
    windows: WindowSet,
    feeding: Feeding,
    short_context: int,
    stride: int,
    alpha: float,
    beta: float,
) -> np.ndarray:
    """Return the key tokens, bool [W, N], under the only method of `tables`. Collective; the same on every rank.

    A token beyond the first K = `short_context` has K to K + `stride` - 1 tokens before it in its short context, except
    in the last span, which ends with the window. Raises `RunStopped` when out of memory.
    """
    longest, short_len = windows.longest, short_context + stride
    # Only the spans matter here; the readings' sums are not used.
    scored = np.ones(longest, dtype=bool)
    starts = [*range(0, longest - short_len, stride), longest - short_len]
    readings = [
        Reading(Protocol.sliding, one_shot, {short_len: spans_at(starts, short_len)}, scored),
        Reading(Protocol.one_shot, one_shot, {longest: spans_at([0], longest)}, scored),
    ]
    todo, found = cells(tables, readings, handle.context_len), list[np.ndarray]()
    total = sum(work_of(model, cell.job.length) * len(cell.job.spans) for cell in todo) * len(windows.tokens)
    with (
        bounded_memory(model, feeding.device),
        keeping_table(handle),
        progress.bar(total, "key tokens", is_shown=distributed.is_main(), bar_format=BAR) as bar,
    ):
        for cell in todo:
            handle.use(cell.table)
            nll, reason, _ = token_nll(model, handle, windows, cell, feeding, bar)
            # Without one of the two there is nothing to compare, so no cell may be left out.
            if reason:
                raise RunStopped(f"out of memory: {cell.name} ({reason}); {REMEDIES}")
            found.append(nll)
    # Jobs are sorted by length: the short context comes first.
    short_nll, long_nll = found
    return key_tokens.choose(long_nll, short_nll, short_context, alpha, beta)
