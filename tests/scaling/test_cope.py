"""CoPE against a slow reference, its config in transformers, and training and evaluation with it."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import train
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import Positions, ScalingConfig
from clex_train.evaluation import results
from clex_train.evaluation.methods import tables
from clex_train.model_config.context_length import context_in_config
from clex_train.models.load import load_for_evaluation
from clex_train.rope import recipes
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.rope.patch import install_rotary
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.methods.cope import Cope
from tests.helpers.composing import composed
from tests.scaling.method_models import L, llama, plain, sharpened


def slow(num_pairs: int, tapered: int, clip_at: float = math.inf) -> list[float]:
    """Compute the frequencies one pair at a time, from the definition."""
    result = []
    for j, theta in enumerate(plain(num_pairs)):
        k = j - (num_pairs - tapered)
        weight = 1.0 if k < 0 else 0.5 * (1 + math.cos(math.pi * k / (tapered - 1)))
        result.append(0.0 if 2 * math.pi / theta > clip_at else theta * weight)
    return result


def recipe(**options: object) -> ScalingConfig:
    return ScalingConfig(name=Method.cope, positions=Positions.skip, options=dict(options))


@pytest.mark.parametrize(
    ("num_pairs", "share", "tapered"), [(64, 0.3125, 20), (8, 0.25, 2), (4, 0.3125, 2), (8, 0.5, 4), (4, 1.0, 4)]
)
@pytest.mark.parametrize("clip", [False, True])
def test_the_slow_pairs_follow_a_half_cosine_and_long_periods_can_be_clipped(
    num_pairs: int, share: float, tapered: int, clip: bool
) -> None:
    rope = Rope(torch.tensor(plain(num_pairs), dtype=torch.float64), context_len=L)
    table = Cope(share=share, clip=clip).table(rope, [1.0, 2.0, 16.0])
    expected = torch.tensor(slow(num_pairs, tapered, L if clip else math.inf), dtype=torch.float64)
    for t in (1.0, 2.0, 16.0):
        torch.testing.assert_close(table.at(t).inv_freq, expected, rtol=1e-14, atol=1e-20)
    assert table.inv_freq[0, -1] == 0
    assert int((table.inv_freq[0] == 0).sum()) == (
        sum(2 * math.pi / each > L for each in plain(num_pairs)) if clip else 1
    )


@pytest.mark.parametrize("clip", [False, True])
def test_its_config_has_the_same_frequencies_at_every_length(tmp_path: Path, clip: bool) -> None:
    recipes.scaled(llama(), recipe(clip=clip, share=0.5), 4.0, L).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = torch.tensor(slow(8, 4, L if clip else math.inf), dtype=torch.float64)
    own = native_handle_on_meta(read, L).own
    assert own is not None
    for t in (1.0, 2.0, 4.0, 16.0):
        torch.testing.assert_close(own.at(t).inv_freq, expected, rtol=1e-6, atol=1e-29)
        assert own.at(t).attention_factor == 1
    assert read.max_position_embeddings == 4 * L
    assert context_in_config(read) == (L, "original_max_position_embeddings")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"share": 0},
            r"scaling\.options\.share=0\.0: greater than 0 and at most 1, of 2 pairs or more; this model has 8",
        ),
        ({"share": 1.1}, r"scaling\.options\.share=1\.1: greater than 0 and at most 1"),
        ({"share": float("nan")}, r"scaling\.options\.share=nan: greater than 0 and at most 1"),
        ({"clip": 3}, r"scaling\.options\.clip=3: Expected `bool`, got `int`"),
        ({"clipped": True}, r"scaling\.options\.clipped=True: no such option; cope has clip, share$"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        recipes.scaled(llama(), recipe(**options), 4.0, L)


@torch.no_grad()
@pytest.mark.parametrize("clip", [False, True])
def test_the_method_on_plain_weights_equals_the_stock_model_of_its_config(clip: bool) -> None:
    model = sharpened(AutoModelForCausalLM.from_config(llama()))
    stock = (
        AutoModelForCausalLM.from_config(recipes.scaled(llama(), recipe(clip=clip, share=0.5), 4.0, L)).double().eval()
    )
    stock.load_state_dict(model.state_dict())
    handle = install_rotary(model, L)
    spec = EvaluationConfig(method_options={"cope": {"clip": clip, "share": 0.5}})
    table = tables([Method.cope], base_rope(handle), 4 * L, spec)["cope"]
    for length in (L, 4 * L):
        ids = torch.arange(length)[None] % 64
        expected = stock(ids).logits
        size = float(expected.abs().max())
        handle.use(table)
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5 * size)
        handle.use(None)
        assert (model(ids).logits - expected).abs().max() > 1e-3 * size


def test_a_run_trains_and_evaluates_it(tmp_path: Path, tiny_store: Path, tiny_architecture: Path) -> None:
    config = composed(
        "+experiment=tiny_base",
        f"output_dir={tmp_path}",
        f"data.path={tiny_store}",
        f"model.config={tiny_architecture}",
        "scaling=cope",
        "scaling.options.clip=true",
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
    ids = torch.randint(3, 200, (2, 4 * L), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        for length in (L, 4 * L):
            assert (ours.model(ids[:, :length]).logits - stock(ids[:, :length]).logits).abs().max() < 1e-6
    assert stock.config.rope_parameters["long_factor"][-1] == 1e30
    [written] = (tmp_path / "evaluation").glob("*.json")
    assert {score.method for score in results.read(written)[0].scores} == {"trained", "none"}
