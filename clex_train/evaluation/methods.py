"""The methods that one set of weights is evaluated with: each is a frequency table put on the model.

`trained` is the model's own table (a model without one stands as it is, at its own frequencies); `none` is plain RoPE
at every length, `pi` position interpolation, `ntk` NTK-aware scaling with alpha = 2t - 1, where CLEX starts
(`scaling.baselines`).
"""

import math
from collections.abc import Sequence

from torch import Tensor

from clex_train.scaling.baselines import TABLES
from clex_train.scaling.table import FrequencyTable, scale_grid
from clex_train.settings.evaluation import Method


def tables(
    methods: Sequence[Method], trained: FrequencyTable | None, base_inv_freq: Tensor, context_len: int, longest: int
) -> dict[str, FrequencyTable]:
    """A table for each method name that serves up to `longest` tokens; `base_inv_freq` [P] is plain RoPE.

    Raises `ValueError` if the trained table ends before `longest`.
    """
    grid = scale_grid(math.ceil(longest / context_len))
    own = trained if trained is not None else TABLES["none"](base_inv_freq, grid)
    chosen = {m.value: own if m is Method.trained else TABLES[m.value](base_inv_freq, grid) for m in methods}
    for table in chosen.values():
        table.least_upper_bound(longest, context_len)
    return chosen
