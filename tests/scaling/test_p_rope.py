"""p-RoPE against a slow reference and the function of transformers, and training and evaluation with it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import train
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.evaluation import results
from clex_train.evaluation.methods import tables
from clex_train.models.load import load_for_evaluation
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from clex_train.rope.probe import require_rotary
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.p_rope import PRope
from tests.helpers.composing import composed
from tests.scaling.method_models import L, llama, plain, sharpened


def recipe(**options: object) -> ScalingConfig:
    return ScalingConfig(name=Method.p_rope, positions=Positions.skip, options=dict(options))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.6, 0.75, 0.99])
@pytest.mark.parametrize("num_pairs", [4, 7, 64])
def test_fast_pairs_are_unchanged_and_slow_ones_are_zero(num_pairs: int, p: float) -> None:
    own = plain(num_pairs)
    expected = [theta if j + 1 <= p * num_pairs else 0.0 for j, theta in enumerate(own)]
    table = PRope(p=p).table(Rope(torch.tensor(own, dtype=torch.float64)), [1.0, 2.0, 16.0])
    for t in (1.0, 2.0, 16.0):
        assert table.at(t).inv_freq.tolist() == expected
    assert table.attention_factors is None
    assert table.method == "p_rope"


@pytest.mark.parametrize("p", [0.25, 0.5, 0.6, 0.75, 0.99])
@pytest.mark.parametrize("num_pairs", [4, 8, 64])
def test_p_rope_equals_the_proportional_rope_of_transformers(num_pairs: int, p: float, tmp_path: Path) -> None:
    config = llama(num_pairs)
    own = require_rotary(config)
    table = PRope(p=p).table(Rope(own.base[own.scaled].inv_freq), [1.0])
    recipes.scaled(config, recipe(p=p), 4.0, L).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS["proportional"](read, torch.device("cpu"))
    assert torch.equal(table.at(1.0).inv_freq, inv_freq.double())
    assert attention_factor == 1
    trained = require_rotary(read)
    assert torch.equal(trained.base[trained.scaled].inv_freq, inv_freq.double())
    assert read.max_position_embeddings == 4 * L


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.0}, r"scaling\.options\.p=0\.0: between 0 and 1, and at least 1/8 for the 8 pairs"),
        ({"p": 1.0}, r"scaling\.options\.p=1\.0: between 0 and 1"),
        ({"p": 0.1}, r"scaling\.options\.p=0\.1: .*at least 1/8"),
        ({"p": float("nan")}, r"scaling\.options\.p=nan: between 0 and 1"),
        ({"p": "half"}, r"scaling\.options\.p=half: Expected `float`, got `str`"),
        ({"q": 0.5}, r"scaling\.options\.q=0\.5: no such option; p_rope has p$"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        recipes.scaled(llama(8), recipe(**options), 4.0, L)


def test_a_partial_rotary_model_is_refused_in_training() -> None:
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"^scaling\.name=p_rope: .*model_type=gpt_neox would rotate 16 pairs, .* 4"):
        recipes.scaled(config, recipe(p=0.5), 4.0, L)


def test_a_run_trains_and_evaluates_it(tmp_path: Path, tiny_store: Path, tiny_architecture: Path) -> None:
    """Use half of the pairs, and compare the model in `final/` with the method applied to its weights."""
    config = composed(
        "+experiment=tiny_base",
        f"output_dir={tmp_path}",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "scaling=p_rope",
        "scaling.options.p=0.5",
        "scaling.factor=4",
        "scaling.positions=skip",
        f"data.seq_len={L}",
        "optim.batch_rows=4",
        "optim.steps=2",
        f"evaluation.lengths=[{L},{4 * L}]",
        "evaluation.num_windows=2",
        "evaluation.methods=[trained,none]",
    )
    train.run(config)
    ours = load_for_evaluation(ModelConfig(path=str(tmp_path / "final")))
    assert (ours.base_inv_freq > 0).tolist() == [True] * 4 + [False] * 4
    ids = torch.randint(3, 200, (2, 4 * L), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        assert (ours.model(ids).logits - stock(ids).logits).abs().max() < 1e-6
    [written] = (tmp_path / "evaluation").glob("*.json")
    assert {score.method for score in results.read(written)[0].scores} == {"trained", "none"}


@torch.no_grad()
def test_the_method_on_plain_weights_equals_the_stock_model_of_its_config() -> None:
    model = sharpened(AutoModelForCausalLM.from_config(llama(8)))
    stock = AutoModelForCausalLM.from_config(recipes.scaled(llama(8), recipe(p=0.5), 4.0, L)).double().eval()
    stock.load_state_dict(model.state_dict())
    handle = install_rotary(model, L)
    spec = EvaluationConfig(method_options={"p_rope": {"p": 0.5}})
    table = tables([Method.p_rope], base_rope(handle), 4 * L, spec)["p_rope"]
    for length in (L, 4 * L):
        ids = torch.arange(length)[None] % 64
        expected = stock(ids).logits
        size = float(expected.abs().max())
        handle.use(table)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 * size)
        handle.use(None)
        assert (model(ids).logits - expected).abs().max() > 1e-3 * size
