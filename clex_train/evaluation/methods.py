"""The methods that one set of weights is evaluated with: each is a frequency table put on the model, one a mask too.

`trained` is the model's own table, or what it does without one; `clex` the same where that is a CLEX. `none` is plain
RoPE at every length, and so is `random_pos`, how a model trained at random positions is read; `lm_infinite` the
Lambda-shaped mask over plain RoPE, or over the model's own frequencies held at one t. The others are formulas of t,
from `scaling.baselines` and, transformers' own, from `rope.hf_scalings`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clex_train.config.evaluation import EvaluationConfig, Method
from clex_train.lm_infinite.install import LmInfinite, apply_lm_infinite
from clex_train.lm_infinite.middle_tokens import BestMiddle
from clex_train.models.load import LoadedModel
from clex_train.rope import hf_scalings
from clex_train.rope.hf_scalings import ConfiguredRope
from clex_train.rope.native import NoRotaryHandle
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.baselines import none_table, ntk_table, pi_table, theta_table
from clex_train.scaling.table import Frequencies, FrequencyTable, scale_grid
from clex_train.utils.bounds import require

Formula = Callable[[Tensor, Tensor], FrequencyTable]
"""(inv_freq [P], t [K]) -> theta(t)."""

InsertedMask = Callable[[], AbstractContextManager[LmInfinite]]

FORMULAS: dict[Method, Formula] = {
    Method.none: none_table,
    Method.pi: pi_table,
    Method.ntk: ntk_table,
    Method.random_pos: none_table,
    Method.lm_infinite: none_table,
}
OF_THE_MODEL = (Method.trained, Method.clex)
WITHOUT_ROPE = (Method.none, Method.lm_infinite)


def of_model(spec: EvaluationConfig, loaded: LoadedModel) -> dict[str, Frequencies]:
    """Frequencies for each of `spec.methods` on a loaded model; `ValueError` for a method that it cannot have."""
    _require_fitting(spec, loaded.handle, loaded.clex is not None)
    trained = loaded.table if loaded.table is not None else loaded.handle.own
    every = formulas(spec, loaded.handle)
    if spec.lm_infinite_t != 1:
        every[Method.lm_infinite] = partial(_held, trained, spec.lm_infinite_t)
    if loaded.table is not None and spec.t_factor is not None:
        trained = replace(loaded.table, t_factor=spec.t_factor)
    return tables(spec.methods, trained, loaded.base_inv_freq, loaded.context_len, spec.longest(), every)


def check(spec: EvaluationConfig, handle: RotaryHandle, has_clex: bool, grid: Tensor | None = None) -> None:
    """Refuse by name what would be refused when it is put into the model; the handle's model needs no weights.

    `grid` [K] is the scale factors of the model's CLEX, where they are known.
    """
    _require_fitting(spec, handle, has_clex)
    if spec.lm_infinite_t != 1 and Method.lm_infinite in spec.methods and grid is not None:
        # Whether there is a t is a matter of the grid, whatever the frequencies.
        _held(none_table(handle.base_inv_freq, grid), spec.lm_infinite_t, handle.base_inv_freq, grid)
    others = [method for method in spec.methods if method not in OF_THE_MODEL]
    tables(others, None, handle.base_inv_freq, handle.context_len, spec.longest(), formulas(spec, handle))
    if Method.lm_infinite in others:
        with insertions(spec, handle.model, handle.context_len)[Method.lm_infinite.value]():
            pass


def tables(
    methods: Sequence[Method],
    trained: Frequencies | None,
    base_inv_freq: Tensor,
    context_len: int,
    longest: int,
    formulas: Mapping[Method, Formula] = FORMULAS,
) -> dict[str, Frequencies]:
    """Frequencies for each method name that serve up to `longest` tokens; `base_inv_freq` [P] is plain RoPE.

    The grid is the integers. Raises `ValueError` if the trained table ends before `longest`.
    """
    assert trained is not None or Method.clex not in methods, "check() has refused clex on a model without"
    grid = scale_grid(math.ceil(longest / context_len))
    own = trained if trained is not None else none_table(base_inv_freq, grid)
    chosen = {m.value: own if m in OF_THE_MODEL else formulas[m](base_inv_freq, grid) for m in methods}
    for table in chosen.values():
        table.least_upper_bound(longest, context_len)
    return chosen


def formulas(spec: EvaluationConfig, handle: RotaryHandle) -> dict[Method, Formula]:
    """The formulas that a model can have, with what they need of it and of the settings."""
    if isinstance(handle, NoRotaryHandle):
        return dict.fromkeys(WITHOUT_ROPE, none_table)
    rope = ConfiguredRope(handle.rotary_config, handle.traits.scaled, handle.context_len)
    return FORMULAS | {
        Method.theta: lambda inv_freq, t: theta_table(inv_freq, t, rope.theta, spec.rope_theta),
        Method.dynamic_ntk: partial(hf_scalings.dynamic_table, rope, factor=spec.dynamic_factor),
        Method.yarn: partial(hf_scalings.yarn_table, rope),
        Method.longrope: partial(_longrope, spec.longrope_factors, handle.own, rope),
    }


def _held(own: Frequencies | None, held_t: float, inv_freq: Tensor, t: Tensor) -> FrequencyTable:
    """The model's own frequencies at `held_t`, whatever the length."""
    assert own is not None, "check() has refused this"
    try:
        spectrum = own.at(held_t)
    except ValueError as error:
        raise ValueError(f"lm_infinite_t={held_t:g}: {error}") from error
    factors = torch.full((len(t),), spectrum.attention_factor, dtype=torch.float64)
    return FrequencyTable(t, spectrum.inv_freq.expand(len(t), -1).clone(), "held", attention_factors=factors)


def _longrope(
    path: str | None, own: Frequencies | None, rope: ConfiguredRope, inv_freq: Tensor, t: Tensor
) -> FrequencyTable:
    """The model's own longrope where it has one, else by the factors of a file."""
    if own is not None and own.method == "longrope":
        spectra = [own.at(float(each)) for each in t]
        factors = torch.tensor([spectrum.attention_factor for spectrum in spectra], dtype=torch.float64)
        thetas = torch.stack([spectrum.inv_freq for spectrum in spectra])
        return FrequencyTable(t, thetas, "longrope", attention_factors=factors)
    remedy = f"model_type={rope.model_type} has no longrope factors of its own; name a JSON file that has them"
    require(path is not None, "evaluation.longrope_factors", path, remedy)
    return hf_scalings.longrope_table(rope, inv_freq, t, hf_scalings.read_longrope_factors(str(path), len(inv_freq)))


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
        remedy = f"model_type={handle.model_type} has no RoPE: trained, none and lm_infinite alone read it as it is"
        require(set(spec.methods) <= {*OF_THE_MODEL, *WITHOUT_ROPE}, "methods", names, remedy)
        handle.require_room(spec.longest())


def insertions(spec: EvaluationConfig, model: nn.Module, context_len: int) -> dict[str, InsertedMask]:
    """Return what methods put into the model beside a table, by method name."""
    n_local = spec.n_local or round(spec.lm_infinite_t * context_len)
    best = BestMiddle(spec.lm_infinite_top_k, spec.lm_infinite_top_k_layer) if spec.lm_infinite_top_k else None
    return {Method.lm_infinite.value: partial(lm_infinite, model, n_local, spec.n_global, best)}


def for_streams(spec: EvaluationConfig, loaded: LoadedModel) -> dict[str, InsertedMask]:
    """`insertions` with their frequencies, for a stream during which t stands still."""
    name = Method.lm_infinite.value
    table = of_model(replace(spec, methods=[Method.lm_infinite]), loaded)[name]
    put_in = insertions(spec, loaded.model, loaded.context_len)[name]
    return {name: partial(lm_infinite_over, loaded.handle, table, put_in)}


@contextmanager
def lm_infinite_over(handle: RotaryHandle, table: Frequencies, put_in: InsertedMask) -> Iterator[LmInfinite]:
    """The mask over a table that is the same at every t."""
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
    """Put the Lambda-shaped mask into a model; `ValueError` by name for one that it does not fit."""
    handle = apply_lm_infinite(model, n_local, n_global, middle=middle)
    try:
        yield handle
    finally:
        handle.undo()
