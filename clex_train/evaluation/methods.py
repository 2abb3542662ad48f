"""The methods that one set of weights is evaluated with: each is a frequency table put on the model, one a mask too.

`trained` is the model's own table (a model without one stands as it is, at its own frequencies); `none` is plain RoPE
at every length, `lm_infinite` the same under the Lambda-shaped mask, `pi` position interpolation, `ntk` NTK-aware
scaling with alpha = 2t - 1, where CLEX starts (`scaling.baselines`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor, nn

from clex_train.attention.hf_interface import LmInfinite, apply_lm_infinite
from clex_train.scaling.baselines import TABLES
from clex_train.scaling.table import FrequencyTable, scale_grid
from clex_train.settings.evaluation import EvaluationConfig, Method


def tables(
    methods: Sequence[Method], trained: FrequencyTable | None, base_inv_freq: Tensor, context_len: int, longest: int
) -> dict[str, FrequencyTable]:
    """A table for each method name that serves up to `longest` tokens; `base_inv_freq` [P] is plain RoPE.

    Raises `ValueError` if the trained table ends before `longest`.
    """
    grid = scale_grid(math.ceil(longest / context_len))
    own = trained if trained is not None else TABLES["none"](base_inv_freq, grid)
    formula = {Method.lm_infinite: "none"}
    chosen = {
        m.value: own if m is Method.trained else TABLES[formula.get(m, m.value)](base_inv_freq, grid) for m in methods
    }
    for table in chosen.values():
        table.least_upper_bound(longest, context_len)
    return chosen


def insertions(
    spec: EvaluationConfig, model: nn.Module, context_len: int
) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """What methods put into the model beside a table, by method name."""
    return {Method.lm_infinite.value: partial(lm_infinite, model, spec.n_local or context_len, spec.n_global)}


@contextmanager
def lm_infinite(model: nn.Module, n_local: int, n_global: int) -> Iterator[LmInfinite]:
    """The Lambda-shaped mask in force on a model; `ValueError` by name for one that it does not fit."""
    handle = apply_lm_infinite(model, n_local, n_global)
    try:
        yield handle
    finally:
        handle.undo()
