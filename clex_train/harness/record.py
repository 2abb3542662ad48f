"""The JSON file of an evaluation by lm-eval: its origin, and scores by task and method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clex_train.config.bos import Bos
from clex_train.config.model import ModelConfig
from clex_train.console.loading_keys import METHOD_KEYS
from clex_train.evaluation import provenance as origins
from clex_train.evaluation.results import FORMAT, Origin
from clex_train.harness.arguments import LmEvalArguments
from clex_train.harness.cells import Cells
from clex_train.harness.truncation import Truncation
from clex_train.utils.files import make_folder, write_atomically

if TYPE_CHECKING:
    from clex_train.harness.benchmark import Benchmark
    from clex_train.harness.scores import Found
    from clex_train.harness.table import Line
    from clex_train.harness.tasks import Tasks

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
    benchmark: Benchmark | None = None,
) -> Origin:
    """Record weights, data and settings; data that tasks download are identified by the tasks' names only."""
    path, environment, data = Path(str(model.path)), origins.environment(dtype), {}
    if benchmark is not None:
        identity = json.dumps(sorted(task.fingerprint for task in benchmark.tasks))
        digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        data = {"path": str(args.benchmark), "fingerprint": digest}
    elif args.include:
        data = {"path": args.include, "fingerprint": origins.files_hash(Path(args.include), TASK_FILES)}
    shaping = {key: getattr(args, key) for key in ("lengths", "batch_size", "num_fewshot", "limit")}
    shaping |= {} if args.bos is Bos.auto else {"bos": args.bos.value}
    shaping |= {"chat_template": True} if args.chat_template else {}
    shaping |= {"truncation": args.cutting.value} if args.cutting is not Truncation.left else {}
    shaping |= {"max_prompt": args.max_prompt} if args.max_prompt is not None else {}
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


def write(file: Path, found: Sequence[Found], origin: Origin, lines: Sequence[Line], text: str) -> None:
    """Write the metrics by key, the table, and the harness's own record of tasks, versions and examples, as JSON.

    `frequencies`, `prompts` and `lm_eval` are by method where methods were named. The table is in a .md file too.
    """
    accounts = {each.method: {key: each.results[key] for key in KEPT if key in each.results} for each in found}
    frequencies = {each.method: each.frequencies for each in found}
    prompts = {each.method: each.prompts for each in found}
    content = {
        "format": FORMAT,
        **vars(origin),
        "context_len": origin.request["context_len"],
        "frequencies": frequencies.get("", frequencies),
        "max_length": origin.request["max_length"],
        "metrics": {key: value for each in found for key, value in each.metrics().items()},
        "table": [_row(line) for line in lines],
        "prompts": prompts.get("", prompts),
        "lm_eval": accounts.get("", accounts),
    }
    make_folder(file.parent)
    write_atomically(file, json.dumps(content, indent=1, default=str) + "\n")
    write_atomically(file.with_suffix(".md"), f"# {origin.label}\n\n{text}\n")


def _row(line: Line) -> dict[str, Any]:
    values = {method: {"value": one.value, "standard_error": one.error} for method, one in line.values.items()}
    return {"name": line.name, "is_average": line.is_average, "values": values.get("", values)}


def cells(folder: Path, origin: Origin, facts: Mapping[str, Any], tasks: Tasks, benchmark: Benchmark | None) -> Cells:
    """Open the folder of finished cells of an evaluation with this origin; `facts` identifies weights and tokenizer."""
    # What was asked for decides which cells there are, not what is in them.
    shared = {key: value for key, value in origin.request.items() if key not in ("tasks", "methods")}
    rows = {task: origin.data.get("fingerprint", "") for task in tasks.single}
    if benchmark is not None:
        rows = {task.name: task.fingerprint for task in benchmark.tasks}
    return Cells(folder, {**shared, **facts}, rows, origin.environment)
