"""Bounds of numeric keys: a value far out of range is refused in one line by its key or is harmless, fast and small.

Harmless means that the configuration is made and, for training, that the plan and its checks are computed.
"""

import math
import resource
import time
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clex_train.cli import lm_eval, loading
from clex_train.cli.evaluation_plan import KEYS, EvaluateConfig, parse
from clex_train.cli.lm_eval import LmEvalConfig
from clex_train.config import root as configuration
from clex_train.config.data import DataConfig, DomainConfig
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.root import Config
from clex_train.console import arguments
from clex_train.console.errors import explain
from clex_train.console.overrides import type_at
from clex_train.preflight.memory_plan import make_plan
from clex_train.preflight.run_checks import Scope, run_checks
from clex_train.scaling.frequency_table import scale_grid
from clex_train.utils.errors import require_at_most
from data_prep.__main__ import VERBS
from tests.helpers.composing import CONF

VALUES = ["nan", "inf", "-inf", "-1", "1e300", str(10**18)]
MOST_SECONDS = 10.0
"""Allows for a busy machine; one check takes about a second on an idle one."""
MOST_KIB = 600_000


def numeric_keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Yield (dotted key, is it a list) for each field of type int or float."""
    for field in fields(schema):
        key, hint = f"{prefix}{field.name}", type_at(schema, field.name)
        if is_dataclass(hint):
            yield from numeric_keys(hint, f"{key}.")
        elif hint in (int, float):
            yield key, False
        elif typing.get_origin(hint) is list and typing.get_args(hint)[0] in (int, float):
            yield key, True


def refusal(make: Any) -> str | None:
    """Return the refusal of a call, or None if it succeeds; fail if it takes long or much memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused: Exception | None = None
    try:
        make()
    except (ValueError, OmegaConfBaseException) as error:
        refused = error
    line = explain(refused) if refused else None
    assert refused is None or (line is not None and "\n" not in line), f"a fault of ours: {refused!r}"
    assert time.monotonic() - start < MOST_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB
    return line


@pytest.fixture(scope="module")
def training() -> DictConfig:
    configuration.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=["+experiment=tiny_clex", "dry_run=true"])


def plan(training: DictConfig, key: str, value: Any) -> None:
    composed = training.copy()
    OmegaConf.update(composed, key, value)
    make_plan(run_checks(configuration.to_config(composed), Scope.plan))


@pytest.mark.parametrize(("key", "is_list"), numeric_keys(Config))
def test_a_number_of_a_run_is_bounded(training, key, is_list):
    for value in VALUES:
        line = refusal(lambda value=value: plan(training, key, [value] if is_list else value))
        assert line is not None or math.isfinite(float(value)), f"{key}={value} was taken"
        assert line is None or key.rpartition(".")[2] in line or "lr_scale" in line, line


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300, "9" * 5000])
def test_weights_and_rows_are_bounded(value):
    domains = {"a": DomainConfig("x")}
    for given in (
        {"domains": {"a": DomainConfig("x", value)}},
        {"domains": domains, "weights_at": {5: {"a": value}}},
        {"domains": domains, "weights_at": {value: {"a": 1}}},
        {"skip_rows": [str(value)]},
        {"skip_rows": [f"0-{value}"]},
    ):
        assert refusal(lambda given=given: DataConfig(**given)), given


@pytest.mark.parametrize(("key", "is_list"), numeric_keys(EvaluateConfig))
def test_a_number_of_an_evaluation_is_bounded(key, is_list):
    def make(value: str) -> None:
        asked = parse(["model=x", "data=y", f"{key}={f'[{value}]' if is_list else value}"])
        given = {name: found for name in KEYS if (found := getattr(asked, name)) is not None}
        replace(EvaluationConfig(), **given)

    for value in VALUES:
        line = refusal(lambda value=value: make(value))
        assert line is not None or math.isfinite(float(value)), f"{key}={value} was taken"


@pytest.mark.parametrize(("key", "is_list"), numeric_keys(LmEvalConfig))
def test_a_number_of_the_harness_is_bounded(key, is_list):
    def make(value: str) -> None:
        given = f"[{value}]" if is_list else value
        asked = arguments.parse(LmEvalConfig, ["model=x", "tasks=[a]", f"{key}={given}"])
        loading.check(asked)
        lm_eval.check(asked)

    for value in VALUES:
        line = refusal(lambda value=value: make(value))
        assert line is not None or math.isfinite(float(value)), f"{key}={value} was taken"


@pytest.mark.parametrize("verb", VERBS)
def test_a_number_of_data_prep_is_bounded(verb):
    schema = VERBS[verb][0]

    def make(key: str, value: Any) -> None:
        config = OmegaConf.structured(schema)
        OmegaConf.update(config, key, value)
        OmegaConf.to_object(config)

    for key, is_list in numeric_keys(schema):
        for value in VALUES:
            line = refusal(lambda key=key, value=[value] if is_list else value: make(key, value))
            accepted = line is None and value != "-1"
            assert line is not None or accepted, f"{verb}: {key}={value} was taken"
            assert line is not None or math.isfinite(float(value)), f"{verb}: {key}={value} was taken"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, [1.0, -math.inf], 10**400, 3])
def test_non_finite_and_too_large_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"^a\.x=.*: a finite number, at most 2$"):
        require_at_most(SimpleNamespace(x=value), "a.", {"x": 2})


@pytest.mark.parametrize("value", [None, -(10**400), -1e300, [2, 2.0]])
def test_finite_numbers_up_to_the_bound_are_accepted(value):
    require_at_most(SimpleNamespace(x=value), "a.", {"x": 2})


def test_a_list_with_too_many_numbers_is_refused(training):
    line = refusal(lambda: plan(training, "evaluation.depths", [0.5] * 10**4))
    assert line == "evaluation.depths=[10000 numbers]: at most 1000"


@pytest.mark.parametrize(("t_max", "step"), [(1e9, 1.0), (2.0, 1e-9), (math.inf, 1.0)])
def test_a_grid_of_scale_factors_is_bounded(t_max, step):
    line = refusal(lambda: scale_grid(t_max, step))
    assert line is not None
    assert "more than 131,072 scale factors" in line
