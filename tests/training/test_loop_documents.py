"""The loss of a step with a document mask: the mean over its scored tokens, for any rows and micro batches."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from clex_train.data import build, step_batches
from clex_train.data.batch import MicroBatch
from clex_train.data.position_sampling import draw_document_positions
from clex_train.data.rows import PADDING, Row
from clex_train.models import architecture, load
from clex_train.models.tokenizer import training_tokenizer
from clex_train.scaling.spectrum import Spectrum
from clex_train.training import loop
from clex_train.utils import seeding
from clex_train.utils.errors import RunStopped

SEQ_LEN = 24
LAYOUTS = [([24], 0), ([5, 1, 10, 8], 0), ([1, 1, 14], 8), ([1] * 20, 4), ([2, 3], 19), ([12, 12], 0)]
"""Documents and padding of the rows of every step; the fourth row has no scored token."""


def given_row(index: int) -> Row:
    lengths, padding = LAYOUTS[index % len(LAYOUTS)]
    segments = np.repeat([*range(len(lengths)), PADDING], [*lengths, padding]).astype(np.int32)
    tokens = np.random.default_rng(index).integers(3, 200, SEQ_LEN)
    # Every third row has a mask, as in a mixture of conversations and plain text.
    scored = np.random.default_rng(index).random(SEQ_LEN) < 0.4 if index % 3 == 0 else None
    return Row(tokens, segments, index, scored)


class GivenRows:
    """Repeat `LAYOUTS` with other tokens for each row, in place of the rows of a store."""

    def __init__(self, rows, seed):
        self.seq_len = rows.seq_len

    def __len__(self):
        return len(LAYOUTS)

    def __getitem__(self, index):
        return given_row(index)


@pytest.fixture
def run(tmp_path, tiny_run, monkeypatch):
    """Return a function that runs train.run on `GivenRows` with a document mask and gives the configuration."""
    monkeypatch.setattr(build, "ShuffledRows", GivenRows)

    def start(name: str, *overrides: str):
        config = tiny_run(
            tmp_path / name,
            f"data.seq_len={SEQ_LEN}",
            "data.document_mask=true",
            "evaluation=never",
            f"optim.batch_rows={len(LAYOUTS)}",
            "optim.steps=2",
            "optim.clip=1e9",
            *overrides,
        )
        train.run(config)
        return config

    start.figures = lambda name: [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().split("\n") if '"loss"' in line
    ]
    return start


def load_initial_model(config):
    """Load the initial weights of a run, and its handle."""
    arch = architecture.to_train(config.model)
    training_tokenizer(config.model, arch, Path(config.data.path) / "tokenizer")
    return load.load_for_training(config, arch, torch.float32, {})


def reference(config, row_indices, t=None):
    """Compute the mean cross-entropy over scored tokens and its gradient norm, one document at a time."""
    loaded = load_initial_model(config)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in row_indices:
        row, start = given_row(index), 0
        runs = np.diff(np.flatnonzero(np.diff(row.segments, prepend=-2, append=-2)))
        generators = [seeding.generator(config.seed, "positions", index, number) for number in range(len(runs))]
        kind = config.scaling.positions.value
        positions = draw_document_positions(kind, runs.tolist(), loaded.context_len, t or 1.0, generators)
        for length in runs.tolist():
            ids = torch.from_numpy(row.tokens[start : start + length])[None]
            if row.segments[start] != PADDING:
                clex = loaded.clex
                spectrum = Spectrum(clex.inv_freq(t), t, clex.attention_factor(t)) if t else None
                scored = np.ones(SEQ_LEN, np.bool_) if row.scored is None else row.scored
                kept = torch.from_numpy(scored[start : start + length])[1:]
                total = total + document_loss(loaded, ids, spectrum, positions[start : start + length], kept)
                count += int(kept.sum())
            start += length
    (total / count).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in loaded.model.parameters() if p.grad is not None)
    return float(total.detach()) / count, squares**0.5


def document_loss(loaded, ids, spectrum, positions, kept):
    if ids.shape[1] == 1:
        return 0.0
    if spectrum:
        with loaded.handle.training(spectrum, positions[None]):
            logits = loaded.model(input_ids=ids, use_cache=False).logits
    else:
        logits = loaded.model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1][kept].double(), ids[0, 1:][kept], reduction="sum")


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_loss_and_gradient_of_a_step_match_those_of_separate_documents(run, micro_batch):
    config = run("plain", f"engine.micro_batch={micro_batch}")
    first = run.figures("plain")[0]
    loss, norm = reference(config, range(len(LAYOUTS)))
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("positions", ["random", "skip"])
def test_every_document_has_separate_positions_under_clex(run, positions):
    sampled = (f"scaling.positions={positions}", "scaling.as_used=0")
    config = run("clex", "scaling=clex", *sampled, "scaling.t_max=4", "engine.micro_batch=2")
    first = run.figures("clex")[0]
    loss, norm = reference(config, range(len(LAYOUTS)), first["t"])
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_resumed_run_is_bitwise_equal(run, monkeypatch):
    clex = ("scaling=clex", "scaling.t_max=4", "engine.micro_batch=2", "checkpoint.every=2", "optim.steps=4")
    run("whole", *clex)
    with monkeypatch.context() as broken:
        broken.setattr(loop, "train_step", interrupt_at(3, loop.train_step))
        with pytest.raises(KeyboardInterrupt):
            run("parts", *clex)
    run("parts", *clex)
    for key in ("loss", "grad_norm", "ode_grad_norm"):
        whole, parts = ([row[key] for row in run.figures(name)] for name in ("whole", "parts"))
        assert len(whole) == 4
        assert whole == parts, key


def interrupt_at(last, train_step):
    def interrupted(parts, step, micro_batches):
        if step == last:
            raise KeyboardInterrupt
        return train_step(parts, step, micro_batches)

    return interrupted


def test_a_step_without_scored_tokens_stops_the_run_by_name(run, monkeypatch):
    monkeypatch.setattr(GivenRows, "__getitem__", lambda self, index: replace(given_row(3), index=index))
    with pytest.raises(RunStopped, match=r"step 0: no token can be scored .*rows 0 to 5.*document_mask=false"):
        run("empty", "engine.micro_batch=2")


def batches_of(counts):
    """Make micro batches of one row with `counts` scored tokens."""
    targets = [torch.where(torch.arange(12) < count, 1, -100)[None] for count in counts]
    return [MicroBatch(torch.ones(1, 12), each, None, torch.tensor([0])) for each in targets]


def test_weights_are_proportional_to_scored_tokens_and_one_on_average():
    weights = step_batches.loss_weights(batches_of([1, 0, 11, 4]), step=0)
    assert weights == [0.25, 0.0, 2.75, 1.0]


def test_weights_of_equal_rows_are_exactly_one():
    assert step_batches.loss_weights(batches_of([7] * 3), step=0) == [1.0] * 3
