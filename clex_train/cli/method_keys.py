"""The keys of the methods that a model is evaluated with, which the programs of evaluation share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clex_train.cli.loading import LoadingConfig
from clex_train.config.method import Method

METHOD_KEYS = (
    "methods",
    "rope_theta",
    "dynamic_factor",
    "longrope_factors",
    "method_options",
    "t_factor",
    "n_local",
    "n_global",
    "lm_infinite_t",
    "lm_infinite_top_k",
    "lm_infinite_top_k_layer",
)


@dataclass
class MethodConfig(LoadingConfig):
    """Arguments of every program that compares scaling methods."""

    methods: list[Method] | None = field(default=None, metadata={"choices": Method})
    """`trained`: the model as it is; `clex`: the same, of a model with CLEX; `lm_infinite`: plain frequencies and the
    Lambda-shaped mask; the others: their frequencies on its weights. By default the run's, or as the model is."""
    rope_theta: float | None = None
    """Base of `theta`; by default 1e6."""
    dynamic_factor: float | None = None
    """Factor of `dynamic_ntk`; by default t. 1 is the dynamic NTK of the YaRN paper, 2 is `ntk`."""
    longrope_factors: str | None = None
    """JSON file with `short_factor` and `long_factor`, for `longrope` on a model without."""
    method_options: dict[str, dict[str, Any]] | None = None
    """Other settings of methods, as `method_options.METHOD.NAME=value`."""
    n_local: int | None = None
    """Latest tokens that `lm_infinite` sees; by default t * L."""
    n_global: int | None = None
    """First tokens that `lm_infinite` sees; by default 10."""
    lm_infinite_t: float | None = None
    """t of the model's own table, which `lm_infinite` keeps at every length; by default 1, plain frequencies."""
    lm_infinite_top_k: int | None = None
    """Best keys between the first and the latest tokens that each query of `lm_infinite` also sees; by default 0. The
    paper's option has 5."""
    lm_infinite_top_k_layer: int | None = None
    """First layer that sees them; by default 5."""
    t_factor: float | None = None
    """`trained` and `clex` take the t of a text this many times as long, up to t_max; by default as it was made."""


def given(asked: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the keys that the command line says, with their values."""
    return {key: value for key in keys if (value := getattr(asked, key)) is not None}
