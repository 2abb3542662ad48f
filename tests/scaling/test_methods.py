"""Scaling methods: closed forms against transformers and their formulas, names and options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from clex_train.cli.evaluation_plan import parse
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import FORMULAS, Method
from clex_train.config.scaling import ScalingConfig
from clex_train.scaling import methods
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.dynamic_ntk import DynamicNtk
from clex_train.scaling.methods.none import none_table
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import pi_table
from clex_train.scaling.methods.theta import LargerBase, theta_table
from tests.helpers.composing import composed


def rope(num_pairs: int = 32, base: float = 10000.0) -> torch.Tensor:
    return base ** (-torch.arange(num_pairs, dtype=torch.float64) / num_pairs)


def hugging_face(kind: str, factor: float, **arguments: float) -> torch.Tensor:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=1,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "factor": factor, "rope_theta": 10000.0},
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **arguments)
    return inv_freq.double()


@pytest.mark.parametrize("t", [1.0, 2.0, 3.5, 16.0])
def test_pi_equals_the_linear_scaling_of_hugging_face(t: float) -> None:
    table = pi_table(rope(), scale_grid(16, 0.5))
    torch.testing.assert_close(table.at(t).inv_freq, hugging_face("linear", t), rtol=3e-7, atol=0)


@pytest.mark.parametrize("t", [2.0, 4.0, 16.0])
def test_ntk_equals_the_dynamic_scaling_of_hugging_face_at_its_alpha(t: float) -> None:
    # Dynamic NTK scales the base by (factor * n / L - (factor - 1)) ^ (d / (d - 2)): 2t - 1 for n = t * L, factor 2.
    expected = hugging_face("dynamic", 2.0, seq_len=int(128 * t))
    torch.testing.assert_close(ntk_table(rope(), scale_grid(16)).at(t).inv_freq, expected, rtol=1e-6, atol=0)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_2t_minus_1() -> None:
    table = ntk_table(rope(), scale_grid(8))
    torch.testing.assert_close(table.inv_freq[:, 0], torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(table.inv_freq[:, -1], rope()[-1] / (2 * table.t - 1))


@pytest.mark.parametrize("method", [Method.none, Method.pi, Method.ntk])
def test_every_table_starts_bitwise_at_the_base(method: Method) -> None:
    base = rope(base=500000.0) / 1.7
    table = methods.create(method).table(Rope(base), scale_grid(4))
    assert torch.equal(table.at(1).inv_freq, base)
    assert table.method == method.value


@pytest.mark.parametrize("method", [Method.none, Method.pi, Method.ntk])
def test_a_single_rotated_pair_has_a_table(method: Method) -> None:
    table = methods.create(method).table(Rope(torch.ones(1)), scale_grid(4))
    assert torch.isfinite(table.at(4).inv_freq).all()


def test_each_name_has_one_module_and_a_unique_label() -> None:
    modules = {path.stem for path in Path(methods.__file__).parent.glob("[a-z]*.py")} - {"base"}
    assert modules == {method.value for method in Method}
    assert len({methods.create(method).label for method in Method}) == len(Method)


@pytest.mark.parametrize("method", FORMULAS)
def test_each_formula_has_a_recipe_in_conf(method: Method) -> None:
    assert composed(f"scaling={method.value}", "dry_run=true").scaling.name is method


def test_labels_match_the_tables_of_the_study() -> None:
    labels = [methods.create(Method(name)).label for name in ("none", "pi", "ntk", "dynamic_ntk", "yarn", "theta")]
    assert labels == ["plain RoPE", "PI", "NTK(2t-1)", "dynamic NTK", "YaRN", "theta 1e6"]
    assert LargerBase(rope_theta=2.5e5).label == "theta 250000"


def test_settings_come_from_the_keys_of_their_group() -> None:
    trained = methods.for_training(ScalingConfig(name=Method.theta, rope_theta=2e6))
    read = methods.for_evaluation(Method.dynamic_ntk, EvaluationConfig(dynamic_factor=2.0))
    assert trained == LargerBase(rope_theta=2e6)
    assert isinstance(read, DynamicNtk)
    assert (read.dynamic_factor, read.prefix) == (2.0, "evaluation.")


def test_options_are_set_by_name_and_typed() -> None:
    config = composed("scaling=dynamic_ntk", "scaling.options.dynamic_factor=2", "dry_run=true").scaling
    assert methods.for_training(config) == DynamicNtk(dynamic_factor=2.0)
    asked = parse(["model=.", "data=.", "methods=[dynamic_ntk]", "method_options.lm_infinite.x=1"])
    assert asked.method_options == {"lm_infinite": {"x": 1}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pi", {"x": 1}, r"scaling\.options\.x=1: no such option; pi has none"),
        ("theta", {"rope_theta": 1e7}, r"scaling\.options\.rope_theta=10000000\.0: no such option; theta has none"),
        ("dynamic_ntk", {"dynamic_factor": "a"}, r"scaling\.options\.dynamic_factor=a: Expected `float \| null`"),
    ],
)
def test_an_unknown_option_of_a_method_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        methods.for_training(ScalingConfig(name=Method(name), options=options))


def test_options_without_a_method_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^scaling\.options={'p': 1}: scaling=none has none"):
        ScalingConfig(options={"p": 1})
    with pytest.raises(ValueError, match=r"^evaluation\.method_options=yarn7: no such method; one of trained, clex"):
        EvaluationConfig(method_options={"yarn7": {}})
    with pytest.raises(ValueError, match=r"^evaluation\.method_options\.yarn\.x=1: no such option; yarn has none"):
        methods.for_evaluation(Method.yarn, EvaluationConfig(method_options={"yarn": {"x": 1}}))


def test_methods_that_need_a_model_config_are_refused_without_one() -> None:
    for method, message in (
        (Method.theta, "rope_theta: unknown"),
        (Method.yarn, r"methods=\[yarn\]: .* needs a model"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.create(method).table(Rope(rope()), [1.0, 2.0])


def test_none_stays_at_the_base() -> None:
    assert torch.equal(none_table(rope(), scale_grid(3)).inv_freq, rope().expand(3, -1))


def test_theta_is_the_plain_rope_of_another_base_at_every_t() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": 1e6})
    expected, _ = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    table = theta_table(rope(), scale_grid(4), 10000.0, 1e6)
    torch.testing.assert_close(table.inv_freq, expected.double().expand(4, -1), rtol=1e-6, atol=0)
    assert table.method == "theta"
    assert theta_table(torch.ones(0), scale_grid(2), 1e4, 1e6).num_pairs == 0
