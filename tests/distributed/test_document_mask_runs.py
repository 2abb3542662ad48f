"""Whole runs on conversations with a document mask: other numbers of scored tokens on each of two ZeRO-3 ranks."""

import json
import os
from pathlib import Path

import pytest
import torch

from data_prep.chat import run as chat
from data_prep.chat.config import ChatTokenizer, ChatVerb
from data_prep.config import CorpusConfig

TEMPLATE = "conf/chat_template/zephyr.jinja"
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
def conversations(tmp_path_factory, tiny_store) -> Path:
    """Write a store of questions about Python sources: some as long as a row, some of a few tokens."""
    folder = tmp_path_factory.mktemp("conversations")
    texts = [
        paragraph
        for python in sorted(Path(os.__file__).parent.glob("json/*.py"))
        for paragraph in python.read_text(encoding="utf-8").split("\n\n")
        if paragraph.strip()
    ]
    turns = [[{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}] for text in texts]
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    (folder / "chats.jsonl").write_text(lines, encoding="utf-8")
    corpus, tokenizer = CorpusConfig(paths=[str(folder / "chats.jsonl")]), str(tiny_store / "tokenizer")
    output = str(folder / "store")
    chat.run(ChatVerb(corpus=corpus, tokenizer=ChatTokenizer(path=tokenizer), template=TEMPLATE, output=output))
    return folder / "store"


@pytest.mark.timeout(1800)
def test_two_ranks_reproduce_the_loss_curve_of_one(launcher, conversations):
    for ranks, name, micro_batch in ((1, "apart_one", 4), (2, "apart_two", 1)):
        overrides = (*OPTIONS, f"data.path={conversations}", f"engine.micro_batch={micro_batch}")
        done = launcher.run(ranks, name, *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.tensor(launcher.figures(name, "loss")) for name in ("apart_one", "apart_two"))
    assert len(one) == len(two) == 6
    # The first step has the same weights; later ones carry the rounding of the updates before them.
    assert abs(one[0] - two[0]) / one[0] < 1e-6
    assert ((one - two).abs() / one).max() < 1e-5
    for norm in ("grad_norm", "ode_grad_norm"):
        one, two = (torch.tensor(launcher.figures(name, norm)) for name in ("apart_one", "apart_two"))
        assert ((one - two).abs() / one).max() < 1e-3, norm
    # What serves the model finds the template and the token that ends a turn.
    final = launcher.folder / "apart_two/final"
    assert (final / "chat_template.jinja").read_text() == Path(TEMPLATE).read_text()
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] in (2, [2])
