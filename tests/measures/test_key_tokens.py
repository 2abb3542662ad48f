"""Key tokens and LongPPL: against full forwards in float64, through the programs, and files that do not fit."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.console import program as console
from clex_train.evaluation import key_tokens, methods, results
from clex_train.evaluation.key_tokens import KeyTokens
from clex_train.evaluation.protocols import readings, require_key_tokens_fit
from clex_train.evaluation.runner import Feeding, evaluate
from clex_train.measures.key_tokens import find
from clex_train.rope.patch import install_rotary
from clex_train.utils.errors import ConfigError
from data_prep import key_tokens as making
from tests.evaluation import evaluate_program
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows

LONGEST, SHORT, STRIDE = 64, 12, 5
ALPHA, BETA = 0.5, -4.0
"""Thresholds at which random weights have some key tokens."""


def full_nll(model: Any, handle: Any, tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    """Compute the nll float64 [W, N - 1] of whole forwards, at the t of `num_tokens`."""
    ids = torch.from_numpy(tokens)
    with torch.no_grad(), handle.fixed(num_tokens):
        logits = model(input_ids=ids, use_cache=False).logits.double()
    return -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].numpy()


def reference(model: Any, handle: Any, tokens: np.ndarray) -> np.ndarray:
    """Mark the key tokens by the paper's definition, token by token."""
    model = model.double()
    long_nll = full_nll(model, handle, tokens, LONGEST)
    marks = np.zeros(tokens.shape, dtype=bool)
    for first in range(SHORT, LONGEST, STRIDE):
        # Tokens first..first + S share the context that begins K tokens before the first of them.
        begin = min(first - SHORT, LONGEST - SHORT - STRIDE)
        short_nll = full_nll(model, handle, tokens[:, begin : begin + SHORT + STRIDE], SHORT + STRIDE)
        for token in range(first, min(first + STRIDE, LONGEST)):
            long, short = long_nll[:, token - 1], short_nll[:, token - begin - 1]
            marks[:, token] = (short - long > ALPHA) & (-long > BETA)
    return marks


def make_list(path: Path, mask: np.ndarray, fingerprint: str = "w", store: str = "s") -> KeyTokens:
    windows = {"count": len(mask), "length": mask.shape[1], "fingerprint": fingerprint}
    positions = [row.nonzero()[0].tolist() for row in mask]
    keys = KeyTokens({}, {"path": "p", "fingerprint": store}, windows, SHORT, STRIDE, 2.0, -2.0, positions)
    key_tokens.write(path, keys)
    return keys


def spec_of(path: Path, **settings: Any) -> EvaluationConfig:
    known = {"lengths": [16, 32, 64], "protocols": [Protocol.sliding, Protocol.long_ppl], "stride": 8}
    return EvaluationConfig(key_tokens=str(path), **{**known, **settings})


@pytest.mark.parametrize("method", [Method.none, Method.ntk])
def test_key_tokens_are_those_of_the_papers_definition(method: Method) -> None:
    model, windows = build_tiny_llama(), random_windows(3, LONGEST)
    handle = install_rotary(model, CONTEXT_LEN)
    tables = methods.tables([method], methods.base_rope(handle), LONGEST)
    feeding = Feeding(20, 40, torch.device("cpu"))
    found = find(model, handle, tables, windows, feeding, SHORT, STRIDE, ALPHA, BETA)
    handle.use(tables[method.value])
    expected = reference(model, handle, windows.tokens)
    assert 5 < expected.sum() < expected.size / 2
    assert not expected[:, :SHORT].any()
    assert np.array_equal(found, expected)


def test_long_ppl_is_the_perplexity_of_the_key_tokens_alone(tmp_path: Path) -> None:
    windows = random_windows(3, LONGEST)
    mask = np.random.default_rng(0).random((3, LONGEST)) < 0.2
    # The second document has none, so it has no weight.
    mask[1], mask[:, 0] = False, True
    make_list(tmp_path / "keys.json", mask)
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    tables = methods.tables([Method.none], methods.base_rope(handle), LONGEST)
    found = evaluate(model, handle, tables, windows, readings(spec_of(tmp_path / "keys.json"), CONTEXT_LEN))
    handle.use(tables["none"])
    nll = full_nll(model.double(), handle, windows.tokens, LONGEST)
    mask[:, 0] = False
    scores = {(score.protocol, score.length): score for score in found.scores}
    whole = scores["long_ppl", LONGEST]
    assert whole.perplexity == pytest.approx(math.exp(nll[mask[:, 1:]].mean()), rel=1e-5)
    assert whole.window_tokens == mask.sum(axis=1).tolist()
    assert whole.window_nll[1] == 0
    assert whole.num_tokens == mask.sum()
    assert whole.standard_error is not None
    for length in (16, 32, 64):
        some, every = scores["long_ppl", length], scores["sliding", length]
        assert some.fingerprint != every.fingerprint
        assert some.window_nll[0] < every.window_nll[0]
    assert set(found.metrics()) >= {f"perplexity/none/long_ppl/{n}" for n in (16, 32, 64)}


def test_a_list_of_other_windows_or_another_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    mask = np.zeros((3, LONGEST), dtype=bool)
    mask[:, 40] = True
    keys = make_list(path, mask)
    assert key_tokens.read(path) == keys
    spec = spec_of(path)
    given = readings(spec, CONTEXT_LEN)
    require_key_tokens_fit(spec, given, "w", "s")
    with pytest.raises(ConfigError, match="made for other windows"):
        require_key_tokens_fit(spec, given, "v", "s")
    with pytest.raises(ConfigError, match="made for another store"):
        require_key_tokens_fit(spec, given, "w", "t")
    with pytest.raises(ConfigError, match="made for windows of 64 tokens"):
        readings(spec_of(path, lengths=[16, 32]), CONTEXT_LEN)
    make_list(path, np.zeros((3, LONGEST), dtype=bool))
    with pytest.raises(ConfigError, match="has no key token"):
        readings(spec, CONTEXT_LEN)


def test_a_damaged_list_and_half_a_request_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    good = make_list(path, np.ones((2, 8), dtype=bool))
    for bad in ("", "[]", "{}", '{"format": 1}'):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="cannot be read as key tokens"):
            key_tokens.read(path)
    for changed in ({"positions": [[1]]}, {"positions": [[1], [8]]}, {"format": 2}):
        key_tokens.write(path, replace(good, **changed))
        with pytest.raises(ConfigError, match="cannot be read as key tokens"):
            key_tokens.read(path)
    with pytest.raises(ConfigError, match="cannot be read as key tokens"):
        key_tokens.read(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="set both, or neither"):
        EvaluationConfig(key_tokens=str(path))
    with pytest.raises(ConfigError, match="set both, or neither"):
        EvaluationConfig(protocols=[Protocol.long_ppl])


def test_the_programs_make_and_score_a_list(places, tmp_path: Path, monkeypatch, capsys) -> None:
    listed, output = tmp_path / "keys.json", tmp_path / "result.json"
    shared = [f"model={places['model']}", f"data={places['store']}", "lengths=[16,64]", "stride=8", "precision=fp32"]
    more = ["alpha=0.5", "beta=-6", "short_context=12", "short_stride=4", f"output={listed}", "methods=[none]"]
    monkeypatch.setattr(sys, "argv", ["key_tokens", *shared, *more])
    assert console.run(making.main, making.usage) == 0
    assert "are key tokens" in capsys.readouterr().out
    content = json.loads(listed.read_text())
    assert content["evaluator"]["path"] == places["model"]
    assert len(content["evaluator"]["hash"]) == 16
    assert (content["alpha"], content["beta"], content["short_context"]) == (0.5, -6.0, 12)
    asked = ["protocols=[one_shot,long_ppl]", f"key_tokens={listed}", "methods=[none,ntk]", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *shared, *asked])
    assert console.run(evaluate_program.program.main, evaluate_program.program.usage) == 0
    read, origin = results.read(output)
    assert {score.protocol for score in read.scores} == {"one_shot", "long_ppl"}
    assert origin.request["key_tokens"] != str(listed)
    monkeypatch.setattr(sys, "argv", ["evaluate", *shared, *asked, "num_windows=2"])
    assert console.run(evaluate_program.program.main, evaluate_program.program.usage) == console.USER_ERROR
    assert "made for other windows" in capsys.readouterr().err
