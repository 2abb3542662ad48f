"""Methods that one set of weights is evaluated with: each is a frequency table for the model, one a mask too.

`trained` is the model's own table, or the unchanged model without one; `clex` the same for a model with CLEX. `none` is
plain RoPE at every length, and so is `random_pos`, for a model trained at random positions; `lm_infinite` the
Lambda-shaped mask over plain RoPE, or over the model's own frequencies at one t. The frequencies are those of
`scaling.methods`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from clex_train.attention.log_scaling import install_log_scaling
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.scaling import LogScale
from clex_train.lm_infinite.install import LmInfinite, apply_lm_infinite
from clex_train.lm_infinite.middle_tokens import BestMiddle
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import NoRotaryHandle
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import Frequencies, scale_grid
from clex_train.scaling.methods import for_evaluation
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.none import none_table
from clex_train.utils.errors import require

if TYPE_CHECKING:
    from clex_train.models.load import LoadedModel

InsertedMask = Callable[[], AbstractContextManager[LmInfinite]]

OF_THE_MODEL = (Method.trained, Method.clex)
WITHOUT_ROPE = (Method.none, Method.lm_infinite)


def model_tables(spec: EvaluationConfig, loaded: LoadedModel) -> dict[str, Frequencies]:
    """Build the frequencies of `spec.methods` for a loaded model; `ConfigError` for a method that does not fit it."""
    _require_fitting(spec, loaded.handle, loaded.clex is not None)
    own = loaded.table if loaded.table is not None else loaded.handle.own
    if loaded.table is not None and spec.t_factor is not None:
        own = replace(loaded.table, t_factor=spec.t_factor)
    return tables(spec.methods, base_rope(loaded.handle, own), spec.longest(), spec)


def check(spec: EvaluationConfig, handle: RotaryHandle, has_clex: bool, grid: Tensor | None = None) -> None:
    """Raise `ConfigError` for a method that does not fit the model; the handle's model needs no weights.

    `grid` [K] is the scale factors of the model's CLEX, if known.
    """
    _require_fitting(spec, handle, has_clex)
    if spec.log_scale not in (None, LogScale.off):
        # Refuses a model whose attention does not read its scale; the meta model stays as it was.
        listen = (handle.on_length, handle.on_call)
        install_log_scaling(handle.model, spec.log_scale.value, handle.context_len, *listen).undo()
    own = handle.own
    if own is None and grid is not None:
        # Only the grid matters for the check of t, so any frequencies will do.
        own = none_table(handle.base_inv_freq, grid)
    # Without a grid, the t of a CLEX are checked once its table is read.
    known = spec if own is not None else replace(spec, lm_infinite_t=1)
    others = [method for method in spec.methods if method not in OF_THE_MODEL]
    tables(others, base_rope(handle, own), spec.longest(), known)
    if Method.lm_infinite in others:
        with insertions(spec, handle.model, handle.context_len)[Method.lm_infinite.value]():
            pass


def tables(
    methods: Sequence[Method], rope: Rope, longest: int, spec: EvaluationConfig | None = None
) -> dict[str, Frequencies]:
    """Build the frequencies of each method for up to `longest` tokens, with the settings of `spec`.

    The grid is the integers. Raises `ConfigError` if the model's own table ends before `longest`.
    """
    spec = spec or EvaluationConfig()
    grid = scale_grid(math.ceil(longest / rope.context_len))
    chosen = {method.value: for_evaluation(method, spec).table(rope, grid) for method in methods}
    for table in chosen.values():
        table.least_upper_bound(longest, rope.context_len)
    return chosen


def _require_fitting(spec: EvaluationConfig, handle: RotaryHandle, has_clex: bool) -> None:
    names = [method.value for method in spec.methods]
    require(has_clex or Method.clex not in spec.methods, "methods", names, "this model holds no CLEX; leave clex out")
    require(has_clex or spec.t_factor is None, "t_factor", spec.t_factor, "this model holds no CLEX; leave the key out")
    scales = has_clex or getattr(handle, "own", None) is not None
    require(
        spec.lm_infinite_t == 1 or scales or Method.lm_infinite not in spec.methods,
        "lm_infinite_t",
        spec.lm_infinite_t,
        "this model has no frequencies of its own at other t; leave the key out",
    )
    if spec.lm_infinite_top_k and Method.lm_infinite in spec.methods:
        config: Any = handle.model.config
        layer, num_layers = spec.lm_infinite_top_k_layer, config.get_text_config().num_hidden_layers
        remedy = f"the model has {num_layers} layers; name one of them, from 0"
        require(layer < num_layers, "lm_infinite_top_k_layer", layer, remedy)
    if {*spec.methods} - {*WITHOUT_ROPE, Method.trained, Method.random_pos} and not isinstance(handle, NoRotaryHandle):
        # A field and formulas of t change the frequencies; the model's own read any length.
        handle.require_scalable()
    if isinstance(handle, NoRotaryHandle):
        remedy = f"model_type={handle.model_type} has no RoPE: trained, none and lm_infinite only can evaluate it"
        require(set(spec.methods) <= {*OF_THE_MODEL, *WITHOUT_ROPE}, "methods", names, remedy)
        handle.require_room(spec.longest())


def insertions(spec: EvaluationConfig, model: nn.Module, context_len: int) -> dict[str, InsertedMask]:
    """Return the masks that methods install in the model in addition to a table, by method name."""
    n_local = spec.n_local or round(spec.lm_infinite_t * context_len)
    best = BestMiddle(spec.lm_infinite_top_k, spec.lm_infinite_top_k_layer) if spec.lm_infinite_top_k else None
    return {Method.lm_infinite.value: partial(lm_infinite, model, n_local, spec.n_global, best)}


def stream_insertions(spec: EvaluationConfig, loaded: LoadedModel) -> dict[str, InsertedMask]:
    """Return `insertions` with their frequencies, for a stream with constant t."""
    name = Method.lm_infinite.value
    table = model_tables(replace(spec, methods=[Method.lm_infinite]), loaded)[name]
    put_in = insertions(spec, loaded.model, loaded.context_len)[name]
    return {name: partial(lm_infinite_over, loaded.handle, table, put_in)}


@contextmanager
def lm_infinite_over(handle: RotaryHandle, table: Frequencies, put_in: InsertedMask) -> Iterator[LmInfinite]:
    """Install the mask over a table that is the same at every t."""
    before = handle.table
    handle.use(table)
    try:
        with handle.pinned(1.0), put_in() as mask:
            yield mask
    finally:
        handle.use(before)


@contextmanager
def lm_infinite(
    model: nn.Module, n_local: int, n_global: int, middle: BestMiddle | None = None
) -> Iterator[LmInfinite]:
    """Install the Lambda-shaped mask in a model; `ConfigError` names a model type that it does not support."""
    handle = apply_lm_infinite(model, n_local, n_global, middle=middle)
    try:
        yield handle
    finally:
        handle.undo()
