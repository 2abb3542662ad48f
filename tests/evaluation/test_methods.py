"""Evaluation methods by kind of model, through the evaluate program."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from clex_train.cli import evaluate as program
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.console import program as console
from clex_train.evaluation.methods import model_tables
from clex_train.evaluation.windows import select
from clex_train.models.load import LoadedModel
from clex_train.rope.patch import install_rotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import CONTEXT_LEN, VOCAB, build_tiny_llama

LENGTHS = [16, 32, 64, 128]
RUN_ON = ["precision=fp32", "num_windows=2", "lengths=[16,32,64,128]", "chunk_len=24"]
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 6.0]}


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="1"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", unk_token="1").save_pretrained(folder)


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def with_rope(model: PreTrainedModel, **scaling: Any) -> PreTrainedModel:
    """Build the model of transformers with a rope_type and the weights of `model`."""
    config = AutoConfig.for_model(**model.config.to_dict())
    config.rope_parameters = {"rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT_LEN, **scaling}
    other = AutoModelForCausalLM.from_config(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def without_rope(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def bloom() -> PreTrainedModel:
    return without_rope("bloom", hidden_size=32, n_layer=2, n_head=4, seq_length=CONTEXT_LEN)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save model directories with three kinds of positions, and a token store."""
    root = tmp_path_factory.mktemp("methods")
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(2, 90, (140,), generator=generator).tolist() for _ in range(2)]
    write_store(root / "store", {"train": documents, "validation": documents}, VOCAB)
    save_tokenizer(root / "store" / "tokenizer")
    (root / "factors.json").write_text(json.dumps(LONG))
    longrope = with_rope(build_tiny_llama(), rope_type="longrope", factor=8.0, **LONG)
    longrope.config.max_position_embeddings = 8 * CONTEXT_LEN
    gpt2 = without_rope("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return {
        "root": str(root),
        "store": str(root / "store"),
        "factors": str(root / "factors.json"),
        "llama": save(build_tiny_llama(), root / "llama"),
        "longrope": save(longrope, root / "longrope"),
        "bloom": save(bloom(), root / "bloom"),
        "gpt2": save(gpt2, root / "gpt2"),
    }


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    return console.run(program.main, program.usage)


def evaluated(monkeypatch, places: dict[str, str], tmp_path: Path, model: str, *arguments: str) -> dict[str, Any]:
    given = [f"model={places[model]}", f"data={places['store']}", f"output={tmp_path / 'out.json'}", *RUN_ON]
    assert call(monkeypatch, *given, *(argument.format(**places) for argument in arguments)) == 0
    return json.loads((tmp_path / "out.json").read_text())


@torch.no_grad()
def one_forward_each(model: PreTrainedModel, store: str, length: int) -> float:
    """Return the perplexity of the same tokens by full forwards of transformers' model, in float64."""
    windows = select(TokenStore(store).split("validation"), max(LENGTHS), 2)
    losses = []
    for start, piece in enumerate(windows.tokens.reshape(-1, length)):
        ids = torch.from_numpy(piece)[None]
        logp = model(ids).logits.double().log_softmax(-1)
        positions = [i for i in range(1, length) if (start * length + i) % min(LENGTHS)]
        losses += [-float(logp[0, i - 1, ids[0, i]]) for i in positions]
    return math.exp(sum(losses) / len(losses))


def test_methods_of_transformers_match_the_perplexity_of_its_models(places, tmp_path, monkeypatch) -> None:
    names = "methods=[pi,yarn,dynamic_ntk,longrope,theta,random_pos]"
    found = evaluated(monkeypatch, places, tmp_path, "llama", names, "longrope_factors={factors}", "rope_theta=5e5")
    for length in LENGTHS:
        t = length / CONTEXT_LEN
        stock = {
            "pi": {"rope_type": "linear", "factor": t},
            "yarn": {"rope_type": "yarn", "factor": t},
            "dynamic_ntk": {"rope_type": "dynamic", "factor": t},
            "longrope": {"rope_type": "longrope", "factor": t, **LONG},
            "theta": {"rope_type": "default", "rope_theta": 5e5},
            "random_pos": {"rope_type": "default"},
        }
        for method, scaling in stock.items():
            expected = one_forward_each(with_rope(build_tiny_llama(), **scaling), places["store"], length)
            assert found["metrics"][f"perplexity/{method}/one_shot/{length}"] == pytest.approx(expected, rel=1e-5)
    beyond = [found["metrics"][f"perplexity/{method}/one_shot/128"] for method in stock]
    assert len({round(value, 3) for value in beyond}) == len(stock)


def test_the_factor_of_dynamic_ntk_can_be_set(places, tmp_path, monkeypatch) -> None:
    found = evaluated(monkeypatch, places, tmp_path, "llama", "methods=[ntk,dynamic_ntk]", "dynamic_factor=2")
    for length in LENGTHS:
        ntk, dynamic = (found["metrics"][f"perplexity/{m}/one_shot/{length}"] for m in ("ntk", "dynamic_ntk"))
        assert dynamic == pytest.approx(ntk, rel=1e-5)


def test_a_longrope_model_is_evaluated_as_in_transformers(places, tmp_path, monkeypatch) -> None:
    names = "methods=[trained,longrope,none]"
    found = evaluated(monkeypatch, places, tmp_path, "longrope", names, "protocols=[one_shot,chunked]")
    assert found["context_len"] == CONTEXT_LEN
    stock = AutoModelForCausalLM.from_pretrained(places["longrope"])
    for length in LENGTHS:
        expected = one_forward_each(stock, places["store"], length)
        for method in ("trained", "longrope"):
            key = f"perplexity/{method}/one_shot/{length}"
            assert found["metrics"][key] == pytest.approx(expected, rel=1e-5)
    assert found["metrics"]["perplexity/none/one_shot/128"] != pytest.approx(expected, rel=1e-3)


def test_an_alibi_model_is_evaluated_unchanged(places, tmp_path, monkeypatch) -> None:
    names = "methods=[trained,none,lm_infinite]"
    found = evaluated(monkeypatch, places, tmp_path, "bloom", names, "protocols=[one_shot,chunked]")
    assert found["context_len"] == CONTEXT_LEN
    for length in LENGTHS:
        expected = one_forward_each(bloom(), places["store"], length)
        for method in ("trained", "none"):
            for protocol in ("one_shot", "chunked"):
                key = f"perplexity/{method}/{protocol}/{length}"
                assert found["metrics"][key] == pytest.approx(expected, rel=1e-5)
    assert found["metrics"]["perplexity/lm_infinite/one_shot/128"] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("llama", ["methods=[clex]"], "methods=['clex']: this model holds no CLEX"),
        ("llama", ["methods=[longrope]"], "longrope_factors: model_type=llama has no longrope factors"),
        ("llama", ["methods=[longrope]", "longrope_factors={root}/no.json"], "longrope_factors={root}/no.json: cannot"),
        ("llama", ["methods=[theta]", "rope_theta=1"], "rope_theta=1.0: a base greater than 1"),
        ("llama", ["methods=[dynamic_ntk]", "dynamic_factor=0.5"], "dynamic_factor=0.5: 1 or more"),
        ("llama", ["methods=[yarn7]"], "methods[0]: should be one of trained, clex, none, pi"),
        ("bloom", ["methods=[trained,yarn]"], "methods=['trained', 'yarn']: model_type=bloom has no RoPE"),
        ("gpt2", ["methods=[lm_infinite]", "lengths=[16,32]"], "model_type=gpt2: its attention does not go"),
        ("gpt2", ["methods=[trained]"], "num_tokens=128: model_type=gpt2 has positions for 64 tokens only"),
    ],
)
def test_an_unsupported_method_is_refused_in_one_line_before_weights_are_read(
    places, monkeypatch, capsys, model: str, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(program, "load", lambda *_: pytest.fail("weights were read"))
    given = [f"model={places[model]}", f"data={places['store']}", *RUN_ON]
    status = call(monkeypatch, *given, *(argument.format(**places) for argument in arguments))
    error = capsys.readouterr().err
    assert status == console.USER_ERROR
    assert message.format(**places) in error
    assert len(error.strip().splitlines()) == 1


class TestTFactor:
    """`t_factor`: reading the model's own table at a multiple of t."""

    def t_at_twice_the_context(self, t_factor: float | None, own: float = 1.0) -> dict[str, float]:
        handle = install_rotary(build_tiny_llama(), CONTEXT_LEN)
        table = replace(ntk_table(handle.base_inv_freq, scale_grid(16)), t_factor=own)
        clex = Clex(handle.base_inv_freq, t_max=16)
        loaded = LoadedModel(handle.model, handle, CONTEXT_LEN, clex=clex, table=table)
        lengths = [CONTEXT_LEN, 2 * CONTEXT_LEN]
        spec = EvaluationConfig(methods=[Method.trained, Method.ntk], lengths=lengths, t_factor=t_factor)
        found = model_tables(spec, loaded)
        return {name: table.least_upper_bound(2 * CONTEXT_LEN, CONTEXT_LEN).t for name, table in found.items()}

    def test_applies_to_trained_and_not_to_formulas(self):
        assert self.t_at_twice_the_context(2) == {"trained": 4.0, "ntk": 2.0}

    def test_defaults_to_that_of_the_model(self):
        assert self.t_at_twice_the_context(None, own=3.0) == {"trained": 6.0, "ntk": 2.0}
        assert self.t_at_twice_the_context(1, own=3.0) == {"trained": 2.0, "ntk": 2.0}

    def test_is_refused_for_a_model_without_clex(self):
        handle = install_rotary(build_tiny_llama(), CONTEXT_LEN)
        with pytest.raises(ValueError, match="t_factor=2: this model holds no CLEX"):
            model_tables(
                EvaluationConfig(lengths=[CONTEXT_LEN], t_factor=2), LoadedModel(handle.model, handle, CONTEXT_LEN)
            )

    def test_below_one_is_refused(self):
        with pytest.raises(ValueError, match=r"evaluation\.t_factor=0\.5: 1 or more"):
            EvaluationConfig(t_factor=0.5)
