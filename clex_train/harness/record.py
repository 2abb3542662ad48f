"""The JSON file of an evaluation by lm-eval: its origin, and scores by task and method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from clex_train.config.bos import Bos
from clex_train.config.model import ModelConfig
from clex_train.console.loading_keys import METHOD_KEYS
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.results import FORMAT, Origin
from clex_train.harness.arguments import LmEvalArguments
from clex_train.harness.scores import Found
from clex_train.harness.tasks import Tasks
from clex_train.utils.files import make_folder, write_atomically

KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples")
TASK_FILES = ("**/*.yaml", "**/*.py", "**/*.json", "**/*.jsonl")
"""Files of the user's own tasks, and their data in the same folder."""


def facts(
    args: LmEvalArguments,
    model: ModelConfig,
    label: str,
    context_len: int,
    tasks: Tasks,
    dtype: torch.dtype,
    max_length: int,
) -> Origin:
    """Record weights, data and settings; data that tasks download are identified by the tasks' names only."""
    path, environment, data = Path(str(model.path)), origins.environment(dtype), {}
    if args.include:
        data = {"path": args.include, "fingerprint": origins.files_hash(Path(args.include), TASK_FILES)}
    shaping = {key: getattr(args, key) for key in ("lengths", "batch_size", "num_fewshot", "limit")}
    shaping |= {} if args.bos is Bos.auto else {"bos": args.bos.value}
    shaping |= {"chat_template": True} if args.chat_template else {}
    shaping |= json.loads(json.dumps(args.given(METHOD_KEYS), default=lambda choice: choice.value))
    if "longrope_factors" in shaping:
        # The contents of the file shape the scores, not its name.
        shaping["longrope_factors"] = Path(shaping["longrope_factors"]).read_text(encoding="utf-8")
    return Origin(
        label=label,
        command=origins.command(),
        model={"path": str(path), "hash": origins.weights_hash(path), "revision": model.revision},
        data=data,
        environment=environment,
        request={
            "tasks": sorted(tasks.names),
            **shaping,
            "max_length": max_length,
            "context_len": context_len,
            "dtype": environment["dtype"],
        },
    )


def write(file: Path, found: Sequence[Found], origin: Origin) -> None:
    """Write the metrics by key, and the harness's own record of tasks, versions and examples, as JSON.

    `frequencies` and `lm_eval` are by method where methods were named.
    """
    accounts = {each.method: {key: each.results[key] for key in KEPT if key in each.results} for each in found}
    frequencies = {each.method: each.frequencies for each in found}
    content = {
        "format": FORMAT,
        **vars(origin),
        "context_len": origin.request["context_len"],
        "frequencies": frequencies.get("", frequencies),
        "max_length": origin.request["max_length"],
        "metrics": {key: value for each in found for key, value in each.metrics().items()},
        "lm_eval": accounts.get("", accounts),
    }
    make_folder(file.parent)
    write_atomically(file, json.dumps(content, indent=1, default=str) + "\n")


def table(found: Found) -> str:
    """Format one line a metric."""
    rows = found.metrics()
    width = max(map(len, rows), default=0)
    return "\n".join(f"{key:<{width}}  {value:.4f}" for key, value in rows.items())
