"""Tables by transformers' formulas, and unchanged models, against stock models of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clex_train.rope.hf_scalings import ConfiguredRope
from clex_train.rope.native import install_native, native_handle_on_meta
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.rope.probe import find_rotary
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.dynamic_ntk import DynamicNtk
from clex_train.scaling.methods.longrope import LongRope, read_longrope_factors
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.scaling.methods.pi import PositionInterpolation, pi_table
from clex_train.scaling.methods.yarn import Yarn
from clex_train.utils.errors import ConfigError
from tests.rope.rotary_families import CONTEXT, VOCABULARY, tiny_model

LENGTHS = [CONTEXT, 2 * CONTEXT, 3 * CONTEXT, 8 * CONTEXT]
GRID = scale_grid(8)


def factors_of(num_pairs: int) -> dict[str, list[float]]:
    return {
        "short_factor": [1 + 0.02 * j for j in range(num_pairs)],
        "long_factor": [1 + 0.9 * j for j in range(num_pairs)],
    }


def rope_of(handle: RotaryHandle) -> ConfiguredRope:
    return ConfiguredRope(handle.base_inv_freq, CONTEXT, config=handle.rotary_config, layer_type=handle.traits.scaled)


def tables_of(handle: RotaryHandle, factors: Path) -> dict[str, FrequencyTable]:
    rope = rope_of(handle)
    factors.write_text(json.dumps(factors_of(len(handle.base_inv_freq))))
    return {
        "linear": rope.stock_table("pi", GRID, lambda t: PositionInterpolation().hf_parameters(rope, t)),
        "yarn": Yarn().table(rope, GRID),
        "dynamic": DynamicNtk().table(rope, GRID),
        "longrope": LongRope(longrope_factors=str(factors)).table(rope, GRID),
    }


@pytest.fixture
def factors(tmp_path: Path) -> Path:
    return tmp_path / "factors.json"


def stock(model: PreTrainedModel, rope_type: str, t: float, num_pairs: int) -> PreTrainedModel:
    """Build the stock model of a rope_type with the weights of `model`."""
    config = AutoConfig.for_model(**model.config.to_dict())
    added: dict[str, Any] = {"rope_type": rope_type, "factor": t, "original_max_position_embeddings": CONTEXT}
    if rope_type == "longrope":
        added |= factors_of(num_pairs)
    if model.config.model_type == "gemma3_text":
        config.rope_parameters["full_attention"] |= added
    else:
        config.rope_parameters = config.rope_parameters | added
    other = AutoModelForCausalLM.from_config(config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))


def read_in_chunks(model: PreTrainedModel, handle: RotaryHandle, ids: torch.Tensor, chunk: int = 5) -> torch.Tensor:
    cache, parts = None, []
    with handle.fixed(ids.shape[1]):
        for first in range(0, ids.shape[1], chunk):
            output = model(input_ids=ids[:, first : first + chunk], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["linear", "yarn", "dynamic", "longrope"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi", "gemma3_text"])
def test_a_table_gives_the_logits_of_the_stock_model_with_that_rope_type(
    family: str, rope_type: str, factors: Path
) -> None:
    model = tiny_model(family, dtype=torch.float64)
    untouched = tiny_model(family, dtype=torch.float64)
    handle = install_rotary(model, CONTEXT)
    table = tables_of(handle, factors)[rope_type]
    for length in LENGTHS:
        ids = tokens(length)
        expected = stock(untouched, rope_type, length / CONTEXT, table.num_pairs)(ids).logits
        handle.use(table)
        ours = read_in_chunks(model, handle, ids)
        assert nll(ours, ids) == pytest.approx(nll(expected, ids), rel=1e-5)
        # The remaining difference: transformers computes the angle in float32.
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        if length == LENGTHS[-1]:
            handle.use(None)
            assert float((model(ids).logits - expected).abs().max()) > 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text", "phi3", "mistral"])
def test_formulas_agree_with_those_of_this_project(family: str, factors: Path) -> None:
    handle = install_rotary(tiny_model(family), CONTEXT)
    tables, base = tables_of(handle, factors), handle.base_inv_freq
    torch.testing.assert_close(tables["linear"].inv_freq, pi_table(base, GRID).inv_freq, rtol=3e-7, atol=0)
    at_2 = DynamicNtk(dynamic_factor=2.0).table(rope_of(handle), GRID)
    torch.testing.assert_close(at_2.inv_freq, ntk_table(base, GRID).inv_freq, rtol=1e-6, atol=0)
    for name in ("linear", "yarn", "dynamic"):
        torch.testing.assert_close(tables[name].inv_freq[0], base, rtol=3e-7, atol=0)
    short = torch.tensor(factors_of(len(base))["short_factor"]).double()
    torch.testing.assert_close(tables["longrope"].inv_freq[0], base / short, rtol=3e-7, atol=0)


def test_yarn_and_longrope_sharpen_attention_with_t_and_not_at_1(factors: Path) -> None:
    tables = tables_of(install_rotary(tiny_model("llama"), CONTEXT), factors)
    assert tables["yarn"].attention_factors[3] == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1)
    for name in ("yarn", "longrope"):
        factors = tables[name].attention_factors
        assert factors[0] == 1
        assert bool((factors.diff() > 0).all())


def test_the_config_of_a_model_is_unchanged(factors: Path) -> None:
    model = tiny_model("phi3")
    before = model.config.to_dict()
    tables_of(install_rotary(model, CONTEXT), factors)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_a_model_with_a_built_in_scaling_gets_no_second_one(scaling: dict[str, Any]) -> None:
    handle = install_rotary(tiny_model("llama", rope_parameters={"rope_theta": 1e4, **scaling}), CONTEXT)
    with pytest.raises(ValueError, match=rf"methods=\[yarn\]: .*model_type=llama .*rope_type={scaling['rope_type']}"):
        Yarn().table(rope_of(handle), GRID)


def self_scaled_model(
    family: str,
    rope_type: str,
    dtype: torch.dtype = torch.float64,
    factors: list[float] | None = None,
    attention_factor: float | None = None,
) -> PreTrainedModel:
    """Build a model that follows the length, or has `factors` at every length."""
    scaling: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if attention_factor is not None:
        scaling["attention_factor"] = attention_factor
    overrides: dict[str, Any] = {}
    if rope_type == "longrope":
        pairs = {"llama": 6, "phi3": 6, "phi": 3}[family]
        lists = factors_of(pairs) if factors is None else {"short_factor": factors, "long_factor": factors}
        scaling |= {**lists, "original_max_position_embeddings": CONTEXT}
        overrides["max_position_embeddings"] = 4 * CONTEXT
    if family == "phi":
        scaling["partial_rotary_factor"] = 0.5
    return tiny_model(family, dtype=dtype, rope_parameters=scaling, **overrides)


OWN = [("llama", "dynamic"), ("phi", "dynamic"), ("llama", "longrope"), ("phi3", "longrope"), ("phi", "longrope")]


@torch.no_grad()
@pytest.mark.parametrize(("family", "rope_type"), OWN)
def test_a_dynamically_scaled_model_reads_chunks_like_whole_windows(family: str, rope_type: str) -> None:
    model = self_scaled_model(family, rope_type)
    handle = install_native(model, CONTEXT)
    for length in (CONTEXT - 3, CONTEXT, CONTEXT + 1, 29, 4 * CONTEXT, 7 * CONTEXT):
        ids = tokens(length)
        expected = self_scaled_model(family, rope_type)(ids).logits
        for ours in (model(ids).logits, read_in_chunks(model, handle, ids)):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_plain_frequencies_differ_from_a_dynamically_scaled_model(rope_type: str) -> None:
    model = self_scaled_model("llama", rope_type)
    handle, ids = install_native(model, CONTEXT), tokens(3 * CONTEXT)
    own = model(ids).logits
    base = handle.base_inv_freq
    handle.use(FrequencyTable(GRID, base.expand(len(GRID), -1)))
    assert (model(ids).logits - own).abs().max() > 1e-3
    handle.use(None)
    assert torch.equal(model(ids).logits, own)


@torch.no_grad()
@pytest.mark.parametrize(("family", "rope_type"), OWN)
def test_theta_of_t_starts_from_what_a_rope_that_follows_the_length_uses_up_to_l(family: str, rope_type: str) -> None:
    model, stock = (self_scaled_model(family, rope_type) for _ in range(2))
    # The module keeps the frequencies of its last call, and the base must not be those.
    model(tokens(3 * CONTEXT))
    handle = install_rotary(model, CONTEXT)
    handle.use(ntk_table(handle.base_inv_freq, torch.arange(1, 5, dtype=torch.float64)))
    for length in (5, CONTEXT):
        assert_same(model(tokens(length)).logits, stock(tokens(length)).logits)
    # At t = 2 the model is one with fixed factors of these frequencies and its own attention factor.
    pairs = len(handle.base_inv_freq)
    plain = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    factors = (plain / ntk_table(handle.base_inv_freq, torch.tensor([1.0, 2.0]).double()).at(2.0).inv_freq).tolist()
    fixed = self_scaled_model(family, "longrope", factors=factors, attention_factor=attention_factor(stock))
    assert_same(model(tokens(2 * CONTEXT)).logits, fixed(tokens(2 * CONTEXT)).logits)
    handle.undo()
    # As long as the first call: the dynamic RoPE of transformers never goes back from there.
    assert torch.equal(model(tokens(3 * CONTEXT)).logits, stock(tokens(3 * CONTEXT)).logits)


def attention_factor(model: PreTrainedModel) -> float:
    return float(find_rotary(model).module.attention_scaling)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("family", "rope_type"), OWN)
def test_a_length_with_other_frequencies_than_short_contexts_is_refused(family: str, rope_type: str) -> None:
    message = f"context_len={2 * CONTEXT}: rope_type={rope_type} of model_type={family} has other frequencies"
    with pytest.raises(ConfigError, match=message):
        install_rotary(self_scaled_model(family, rope_type), 2 * CONTEXT)


@torch.no_grad()
def test_a_module_that_ignores_its_frequencies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = self_scaled_model("llama", "longrope")
    stock_forward = type(model.model.rotary_emb).forward

    def ignoring(self, x, position_ids):
        cos, sin = stock_forward(self, x, position_ids)
        return (cos * 1.1, sin * 1.1) if int(position_ids.max()) >= CONTEXT else (cos, sin)

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", ignoring)
    with pytest.raises(ValueError, match="rope_type=longrope of model_type=llama: it follows the length in"):
        install_native(model, CONTEXT)


def small(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **settings)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


WITHOUT_ROPE: dict[str, dict[str, Any]] = {
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
    "bloom": {"hidden_size": 32, "n_head": 4, "n_layer": 2},
    "falcon": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "alibi": True},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 4 * CONTEXT},
    "opt": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
    | {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 4 * CONTEXT, "rotary_dim": 4},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 4 * CONTEXT, "rotary_dim": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(WITHOUT_ROPE))
def test_a_model_without_rope_reads_chunks_like_whole_windows(kind: str) -> None:
    model = small(kind, **WITHOUT_ROPE[kind])
    handle = install_native(model, CONTEXT)
    for length in (CONTEXT, 4 * CONTEXT):
        ids = tokens(length)
        with handle.fixed(length):
            expected = model(ids).logits
        ours = read_in_chunks(model, handle, ids)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert len(handle.base_inv_freq) == 0


@torch.no_grad()
def test_the_biases_of_mpt_extend_linearly_beyond_its_context() -> None:
    model = small("mpt", **WITHOUT_ROPE["mpt"])
    longer = small("mpt", **(WITHOUT_ROPE["mpt"] | {"max_seq_len": 8 * CONTEXT}))
    handle, ids = install_native(model, CONTEXT), tokens(8 * CONTEXT)
    with handle.fixed(8 * CONTEXT):
        torch.testing.assert_close(model(ids).logits, longer(ids).logits)
    assert model.config.max_seq_len == CONTEXT


def test_learned_positions_have_a_maximum_length_and_alibi_has_none() -> None:
    handle = install_native(small("gpt2", **WITHOUT_ROPE["gpt2"]), CONTEXT)
    with pytest.raises(ValueError, match=r"num_tokens=65: model_type=gpt2 .* for 64 tokens"), handle.fixed(65):
        pytest.fail("there are no such positions")
    assert install_native(small("bloom", **WITHOUT_ROPE["bloom"]), CONTEXT).max_tokens is None


def test_methods_that_need_frequencies_are_refused_without_rope() -> None:
    handle = install_native(small("bloom", **WITHOUT_ROPE["bloom"]), CONTEXT)
    base = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="table of 4 pairs: model_type=bloom has no RoPE"):
        handle.use(pi_table(base, GRID))
    with pytest.raises(ValueError, match="model_type=bloom: no rotary"), handle.training(pi_table(base, GRID).at(1)):
        pytest.fail("nothing can be trained")


def test_a_model_without_a_kv_cache_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="model_type=mamba: no rotary position embedding and no KV cache"):
        native_handle_on_meta(AutoConfig.for_model("mamba", num_hidden_layers=1), CONTEXT)


def test_longrope_factors_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(factors_of(3) | {"note": "searched"}))
    assert read_longrope_factors(str(path), 3) == factors_of(3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read"),
        ("[", "cannot be read"),
        ("[1]", "short_factor is a list of 3"),
        (json.dumps({"short_factor": [1, 1, 1]}), "long_factor is a list of 3 .* found none"),
        (json.dumps(factors_of(4)), "short_factor is a list of 3 .* found 4 entries"),
        (json.dumps(factors_of(3) | {"long_factor": [1, 0, 1]}), "long_factor"),
    ],
)
def test_a_file_of_factors_that_does_not_fit_is_refused_by_name(tmp_path, content, complaint: str) -> None:
    path = tmp_path / "factors.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"evaluation.longrope_factors=.*factors.json: .*{complaint}") as error:
        read_longrope_factors(str(path), 3)
    assert "\n" not in str(error.value)
