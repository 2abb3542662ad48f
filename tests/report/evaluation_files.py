"""Evaluation files and run folders as the programs write them, with known numbers."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score
from clex_train.scaling.frequency_table import TABLE, FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table

LENGTHS = (128, 256, 2048)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""Config of a model with as many pairs as the learned frequencies below: 12."""
ORIGIN = Origin(
    "base",
    ["python", "-m", "clex_train.cli.evaluate", "run=runs/base"],
    {"path": "runs/base/final", "hash": "ab12"},
    {"path": "corpora/books", "fingerprint": "cd"},
    {"git_commit": "c0ffee", "device": "cpu", "world_size": 1, "torch": "2"},
)


def outcome(
    perplexities: dict[str, list[float]], fingerprint: str = "f", protocol: str = "one_shot", context_len: int = 128
) -> Results:
    """Make scores of 100 tokens in two windows: for each method a perplexity at 128, 256 and 2048 tokens."""
    scores = [
        Score(
            method=method,
            protocol=protocol,
            length=length,
            frequencies="clex" if method == "trained" else method,
            t=length / context_len,
            window_nll=[math.log(p) * 30, math.log(p) * 70],
            num_tokens=100,
            seconds=1.5,
            fingerprint=fingerprint,
        )
        for method, row in perplexities.items()
        for length, p in zip(LENGTHS, row, strict=True)
    ]
    windows = {
        "count": 2,
        "length": 2048,
        "score_stride": 128,
        "fingerprint": fingerprint,
        "documents": [4, 9],
        "starts": [0, 0],
    }
    return Results(scores, context_len, windows)


def relabelled(label: str) -> Origin:
    """Copy the origin with another label."""
    return Origin(**{**vars(ORIGIN), "label": label})


def add_to_file(path: Path, **parts: Any) -> None:
    """Add top-level entries to an evaluation file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def task_row(method: str, length: int, depth: float | None, correct: int, task: str = "passkey") -> dict[str, Any]:
    """Make a row of `tasks` with `correct` of ten prompts."""
    return {
        "task": task,
        "method": method,
        "length": length,
        "depth": depth,
        "correct": correct,
        "total": 10,
        "score": correct / 10,
    }


def make_run(folder: Path, perplexities: dict[str, list[float]], learned: bool, label: str | None = None) -> Path:
    """Write a finished run: 40 steps of metrics, one evaluation, and with `learned` a frequency table."""
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text(json.dumps(LLAMA))
    (folder / "config.yaml").write_text("optim:\n  steps: 40\n")
    facts = {"command": ["python", "train.py"], "git_commit": "c0ffee", "device": "CPU, 2 cores", "packages": {}}
    (folder / "environment.json").write_text(json.dumps({**facts, "data_fingerprint": "dd"}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 41):
            row = {"step": step, "loss": 5 - step / 20, "tokens": 1024 * step, "tokens_per_second": 3000.0 + step}
            row |= {"step_seconds": 0.3, "memory_gib": 0.5} | ({"t": 1 + step % 16} if learned else {})
            file.write(json.dumps(row) + "\n")
        file.write(json.dumps({"step": 40, "perplexity/none/one_shot/128": 3.0}) + "\n")
    if learned:
        base = 10000.0 ** (-torch.arange(12, dtype=torch.float64) / 12)
        ntk = ntk_table(base, scale_grid(16))
        bent = ntk.inv_freq * (1 + 0.01 * (ntk.t[:, None] - 1))
        FrequencyTable(ntk.t, bent, method="clex", context_len=128).save(folder / "final" / TABLE)
    name = label or folder.name
    results.write(folder / "evaluation" / f"{name}.json", outcome(perplexities), relabelled(name))
    return folder
