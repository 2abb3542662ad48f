"""`benchmark`: write rows and task files of lm-eval from the published files of a benchmark.

The folder has, for each task, <task>.jsonl and <task>.yaml, which includes lm-eval's own task file by its path, and
`benchmark.json`. Stock lm-eval reads it too: `lm-eval run --include_path FOLDER --tasks NAME`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from clex_train.harness import benchmark
from clex_train.harness.benchmark import MANIFEST, Benchmark, BenchmarkTask, Kind
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.files import atomic_directory, require_writable_folder, sha256
from data_prep.benchmark import babilong, longbench, longbench_v2, ruler
from data_prep.benchmark.config import BenchmarkVerb
from data_prep.benchmark.datasets import Converter, Dataset
from data_prep.benchmark.rows import find
from data_prep.resume import disk_full_explained

CONVERTERS: dict[Kind, Converter] = {
    Kind.longbench: longbench.convert,
    Kind.longbench_v2: longbench_v2.convert,
    Kind.ruler: ruler.convert,
    Kind.babilong: babilong.convert,
}

logger = log.get(__name__)


def run(config: BenchmarkVerb) -> None:
    """Convert the files.

    Raises:
        ConfigError: a file is damaged or not of the benchmark, a column is missing or unknown, or the output exists.
    """
    if config.kind is None:
        raise ConfigError("kind", None, f"name the benchmark: {', '.join(kind.value for kind in Kind)}")
    require(len(config.paths) > 0, "paths", config.paths, "name the published files: paths=[/data/LongBench/data.zip]")
    require(config.output is not None, "output", config.output, "name the folder to write")
    output = Path(str(config.output)).resolve()
    _require_free(output, config.overwrite)
    stock, files = benchmark.stock_tasks(), find(config.paths)
    with disk_full_explained(output), atomic_directory(output) as folder:
        made, notes, groups, sources = [], [], {}, []
        for dataset in CONVERTERS[config.kind](files, config.tasks):
            notes += _counted(dataset, config.allow_partial)
            made.append(_write(dataset, folder, output, stock))
            groups[dataset.group.name] = dataset.group
            sources.append(dataset.source)
        found = Benchmark(
            kind=config.kind,
            place=str(output),
            stock=str(stock),
            sources=sorted(set(sources)),
            groups=[*groups.values()],
            tasks=made,
            notes=notes,
        )
        (folder / MANIFEST).write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    rows = sum(task.num_rows for task in made)
    logger.info("%s: %d tasks of %s, %s rows", output, len(made), config.kind.value, f"{rows:,}")


def _require_free(output: Path, overwrite: bool) -> None:
    require_writable_folder("output", output, output.parent)
    if output.exists():
        require(overwrite, "output", output, "exists; choose another folder, or set overwrite=true")
        # A typing error must not replace a folder of something else.
        known = (output / MANIFEST).is_file() or (output.is_dir() and not any(output.iterdir()))
        require(known, "output", output, "is no benchmark of this program; choose another folder")


def _counted(dataset: Dataset, allow_partial: bool) -> list[str]:
    """Return a note on a task with another number of rows than published; `ConfigError` unless that is allowed."""
    if dataset.counted is None or dataset.counted[0] == dataset.counted[1]:
        return []
    counts = "{} rows where {} are published".format(*dataset.counted)
    remedy = f"has {counts}: cut short? Download it again, or set allow_partial=true"
    require(allow_partial, dataset.source, None, remedy)
    return [f"{Path(dataset.source).name}: {counts}"]


def _write(dataset: Dataset, folder: Path, output: Path, stock: Path) -> BenchmarkTask:
    """Write rows and task file of a task; paths in it are those of the finished folder."""
    data = folder / f"{dataset.name}.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in dataset.rows)
    definition: dict[str, Any] = {"task": dataset.name, **dataset.fields}
    if dataset.stock is not None:
        path = stock / dataset.stock
        remedy = "lm-eval has no such task in this version; install that of requirements-eval.txt"
        require(path.is_file(), str(path), None, remedy)
    places = {
        **({"include": str(stock / dataset.stock)} if dataset.stock is not None else {}),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {dataset.split: str(output / data.name)}},
        "test_split": dataset.split,
    }
    text = yaml.safe_dump({**places, **definition}, sort_keys=False, allow_unicode=True, width=1000)
    if dataset.scores is not None:
        text += f"process_results: !function {dataset.scores}\n"
    (folder / f"{dataset.name}.yaml").write_text(text, encoding="utf-8")
    identity = json.dumps([definition, dataset.stock, dataset.scores], sort_keys=True)
    return BenchmarkTask(
        name=dataset.name,
        group=dataset.group.name,
        category=dataset.category,
        num_rows=len(dataset.rows),
        sha256=sha256(data),
        definition=hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
        in_chat=dataset.in_chat,
    )
