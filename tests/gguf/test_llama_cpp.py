"""GGUF files in llama.cpp, against our own model at t (marker `engine`; `make test-engines` installs llama.cpp).

Tolerances in log-probability: 1e-3 with an F32 cache of keys and values, 5e-2 with llama.cpp's default, F16.
"""

import atexit
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from clex_train.api import apply_clex
from clex_train.cli import export
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.console import program
from clex_train.gguf import files, token_ids
from clex_train.gguf.files import Entry, Field, contents
from clex_train.gguf.tensors import WeightType
from clex_train.gguf.token_ids import encoder
from clex_train.gguf.vocabulary import read_vocabulary
from clex_train.models.load import load_for_evaluation
from clex_train.scaling.frequency_table import FrequencyTable
from tests.gguf import gguf_models
from tests.gguf.gguf_models import CONTEXT, ROOT, VOCAB_SIZE, T

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("engines") / "llama_cpp.mjs"
ENGINES = Path(os.environ.get("CLEX_ENGINES", ROOT / ".engines"))
SERVED = round(T * CONTEXT)
NUM_TOKENS = 250
ROOM = SERVED + 32
"""Tokens of the engine's context; a full one would be shifted."""
F16_CACHE, F32_CACHE = 5e-2, 1e-3
BEFORE, AFTER = CONTEXT - 8, 24
"""Tokens of a prompt and of its continuation, which crosses L."""


@dataclass
class Answer:
    """Numbers of the engine for one file."""

    log_p: Tensor
    greedy: list[int]
    context: int


def ids() -> list[int]:
    drawn = torch.randint(4, VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    return [int(each) for each in drawn]


@cache
def server() -> subprocess.Popen[str]:
    """Start `llama_cpp.mjs` once: on a busy machine, llama.cpp's own test of its binary takes a minute."""
    command = ["node", str(SCRIPT), str(ENGINES)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def call(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job of `llama_cpp.mjs`; a missing engine fails, since only `make test-engines` asks for these tests."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{json.dumps(job)}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    assert line, "llama.cpp did not start; `make test-engines` installs it"
    answer = dict(json.loads(line))
    assert "error" not in answer, answer["error"]
    return answer


def run(file: Path, kv: str = "F16") -> Answer:
    job = {"model": str(file), "contextSize": ROOM, "cache": kv, "tokens": ids(), "prompt": ids()[:BEFORE]}
    found = call({**job, "count": AFTER})
    log_p = torch.tensor(found["probabilities"], dtype=torch.float64).log()
    return Answer(log_p, found["greedy"], found["context"])


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return gguf_models.byte_level()


@torch.no_grad()
def ours(folder: Path, factors: Sequence[float], attention_factor: float = 1.0) -> tuple[Tensor, list[int]]:
    """Return log-probabilities and a greedy continuation of our own model pinned to t, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rope = model.config.rope_parameters
    width = 2 * len(factors)
    plain = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    scaled = plain / torch.tensor(factors, dtype=torch.float64)
    attention = torch.tensor([1.0, attention_factor], dtype=torch.float64)
    t_grid = torch.tensor([1.0, T], dtype=torch.float64)
    # Known to `apply_clex` alone: transformers has not seen the factors.
    table = FrequencyTable(t_grid, torch.stack([plain, scaled]), "clex", CONTEXT, attention_factors=attention)
    clex = apply_clex(model, table, context_len=CONTEXT)
    tokens = torch.tensor([ids()])
    with clex.pinned(T):
        log_p = model(tokens).logits[0].double().log_softmax(-1)
        prompt = tokens[:, :BEFORE]
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": AFTER, "min_new_tokens": AFTER}
        mask = torch.ones_like(prompt)
        longer = model.generate(prompt, attention_mask=mask, pad_token_id=0, eos_token_id=[], **options)
    return log_p, longer[0, BEFORE:].tolist()


def error(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference in log p over ids with p > 1e-6."""
    return float((expected - found)[expected.exp() > 1e-6].abs().max())


@pytest.mark.parametrize("family", gguf_models.OWN)
def test_llama_cpp_computes_our_model_at_t_on_both_sides_of_l(family: str, tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / family, family, tokenizer())
    factors = gguf_models.factors(gguf_models.num_pairs(folder))
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, factors, SERVED)
    expected, continued = ours(folder, factors)
    exact, usual = (run(tmp_path / "model.gguf", kv) for kv in ("F32", "F16"))
    assert error(expected, exact.log_p) < F32_CACHE
    assert error(expected, usual.log_p) < F16_CACHE
    assert torch.equal(expected.argmax(-1), usual.log_p.argmax(-1))
    assert usual.greedy == continued
    assert usual.context == SERVED


@pytest.mark.parametrize("log_scale", [LogScale.off, LogScale.eval])
@pytest.mark.parametrize("way", ["written", "added"])
def test_the_export_program_writes_what_the_product_computes(
    way: str, log_scale: LogScale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, arguments = gguf_models.save_clex(tmp_path / "final", log_scale=log_scale), []
    if way == "added":
        gguf_models.write_gguf(tmp_path / "plain.gguf", final, [1.0] * 16, CONTEXT)
        weights = [each.name for each in files.read(tmp_path / "plain.gguf").tensors if each.name != files.ROPE_FREQS]
        arguments = [f"base_gguf={rewritten(tmp_path / 'base.gguf', tmp_path / 'plain.gguf', weights)}"]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["", f"model={final}", "format=gguf", "t=4", f"output={out}", *arguments])
    assert program.run(export.main, export.usage) == 0
    loaded = load_for_evaluation(ModelConfig(path=str(final)))
    with torch.no_grad(), loaded.handle.fixed(SERVED):
        expected = loaded.model(torch.tensor([ids()])).logits[0].double().log_softmax(-1)
    found = run(out / export.MODEL, "F32")
    assert error(expected, found.log_p) < F32_CACHE
    assert found.context == SERVED


def llama(tmp_path: Path) -> tuple[Path, list[float]]:
    folder = gguf_models.save(tmp_path / "llama", "llama", tokenizer())
    return folder, gguf_models.factors(gguf_models.num_pairs(folder))


def rewritten(file: Path, base: Path, keep: Sequence[str]) -> Path:
    """Write a file again with some of its tensors only."""
    reader = files.read(base)
    fields = [
        Field(field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in reader.fields.values()
        if not field.name.startswith("GGUF.") and field.name != "general.architecture"
    ]
    entries = [
        Entry(each.name, tuple(each.data.shape), each.data.dtype, each.tensor_type, lambda data=each.data: data)
        for each in reader.tensors
        if each.name in keep
    ]
    files.write(file, files.Content(contents(reader, "general.architecture"), fields, entries, lambda reader: None))
    return file


def test_wrong_exports_are_caught(tmp_path: Path) -> None:
    folder, factors = llama(tmp_path)
    expected, _ = ours(folder, factors)
    good = tmp_path / "good.gguf"
    gguf_models.write_gguf(good, folder, factors, SERVED)
    gguf_models.write_gguf(tmp_path / "reversed.gguf", folder, factors[::-1], SERVED)
    names = [each.name for each in files.read(good).tensors if each.name != files.ROPE_FREQS]
    without = rewritten(tmp_path / "without.gguf", good, names)
    for wrong in (tmp_path / "reversed.gguf", without):
        answer = run(wrong)
        before, after = (error(expected[part], answer.log_p[part]) for part in (slice(CONTEXT), slice(CONTEXT, None)))
        assert min(before, after) > 20 * F16_CACHE, wrong
    gguf_models.write_gguf(tmp_path / "short.gguf", folder, factors, CONTEXT)
    # The numbers are right; llama.cpp takes this length as its default context, and stops there.
    assert run(tmp_path / "short.gguf").context != SERVED


def test_an_attention_factor_reaches_llama_cpp(tmp_path: Path) -> None:
    folder, factors = llama(tmp_path)
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, factors, SERVED, attention_factor=1.15)
    expected, _ = ours(folder, factors, attention_factor=1.15)
    assert error(expected, run(tmp_path / "model.gguf", "F32").log_p) < F32_CACHE


def test_a_scale_of_the_queries_is_one_of_the_logits(tmp_path: Path) -> None:
    folder, factors = llama(tmp_path)
    scale = 1.3
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, factors, SERVED, query_scale=scale)
    # cos and sin enter q and k, so their factor is the root.
    expected, _ = ours(folder, factors, attention_factor=scale**0.5)
    assert error(expected, run(tmp_path / "model.gguf", "F32").log_p) < F32_CACHE


def test_half_precision_weights_stay_close(tmp_path: Path) -> None:
    folder, factors = llama(tmp_path)
    expected, _ = ours(folder, factors)
    for weight_type, most in ((WeightType.f16, 0.1), (WeightType.bf16, 1.0)):
        gguf_models.write_gguf(tmp_path / "model.gguf", folder, factors, SERVED, weight_type=weight_type)
        assert error(expected, run(tmp_path / "model.gguf", "F32").log_p) < most, weight_type


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_factors_added_to_a_quantised_file_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    folder = gguf_models.save(tmp_path / architecture, architecture, tokenizer())
    factors = gguf_models.factors(gguf_models.num_pairs(folder))
    base = gguf_models.quantised(tmp_path / "base.gguf", folder)
    theta = contents(files.read(base), f"{architecture}.rope.freq_base")
    gguf_models.add_factors(tmp_path / "added.gguf", base, factors, SERVED, rope_theta=theta)
    gguf_models.dequantise(folder, base)
    expected, _ = ours(folder, factors)
    answer = run(tmp_path / "added.gguf", "F32")
    assert error(expected, answer.log_p) < 0.5  # the engine rounds activations to 8 bits as well
    assert error(expected, run(base, "F32").log_p) > 2.0
    assert answer.context == SERVED


@pytest.mark.parametrize("pre", [*token_ids.SPLITS, "pieces"])
def test_llama_cpp_reads_text_as_the_verification_says(pre: str, tmp_path: Path) -> None:
    words = gguf_models.tokenizer_for(pre)
    folder = gguf_models.save(tmp_path / "llama", "llama", words)
    loaded = AutoTokenizer.from_pretrained(folder)
    gguf_models.write_gguf(tmp_path / "model.gguf", folder, gguf_models.factors(16), SERVED)
    vocabulary = read_vocabulary(files.read(tmp_path / "model.gguf"))
    assert vocabulary.pre == ("default" if pre == "pieces" else pre)
    texts = [*token_ids.SAMPLES, *gguf_models.TEXT, *token_ids.RARE]
    found = call({"model": str(tmp_path / "model.gguf"), "texts": texts})["ids"]
    # The package leaves BOS to its caller.
    assert found == encoder(replace(vocabulary, adds_bos=False))(texts)
    exact = slice(-len(token_ids.RARE)) if pre in ("gpt-4o", "tekken") else slice(None)
    assert found[exact] == [loaded(text, add_special_tokens=False)["input_ids"] for text in texts][exact]
