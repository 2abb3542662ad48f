"""Whole runs with a document mask: rows with different numbers of scored tokens on two ZeRO-3 ranks."""

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.config import CorpusConfig, TokenizerConfig, TokenizeVerb
from data_prep.tokenize import run as tokenize

OPTIONS = (
    "scaling=clex",
    "scaling.as_used=0",  # a step at t = 1 has no gradient in the ODE, and a norm of 0
    "scaling.t_max=4",
    "data.document_mask=true",
    "evaluation=never",
    "optim.steps=6",
    "checkpoint.every=0",
)


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory, tiny_store) -> Path:
    """Write a store of paragraphs of Python sources: some as long as a row, some of a few tokens."""
    folder = tmp_path_factory.mktemp("paragraphs")
    texts = [
        paragraph
        for python in sorted(Path(os.__file__).parent.glob("json/*.py"))
        for paragraph in python.read_text(encoding="utf-8").split("\n\n")
        if paragraph.strip()
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    corpus = CorpusConfig(paths=[str(folder / "texts.jsonl")])
    tokenizer = TokenizerConfig(path=str(tiny_store / "tokenizer"))
    tokenize.run(TokenizeVerb(corpus=corpus, tokenizer=tokenizer, output=str(folder / "store")))
    return folder / "store"


@pytest.mark.timeout(1800)
def test_two_ranks_reproduce_the_loss_curve_of_one(launcher, short_documents):
    for ranks, name, micro_batch in ((1, "apart_one", 4), (2, "apart_two", 1)):
        overrides = (*OPTIONS, f"data.path={short_documents}", f"engine.micro_batch={micro_batch}")
        done = launcher.run(ranks, name, *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.tensor(launcher.figures(name, "loss")) for name in ("apart_one", "apart_two"))
    assert len(one) == len(two) == 6
    assert ((one - two).abs() / one).max() < 1e-5
    for norm in ("grad_norm", "ode_grad_norm"):
        one, two = (torch.tensor(launcher.figures(name, norm)) for name in ("apart_one", "apart_two"))
        assert ((one - two).abs() / one).max() < 1e-3, norm
