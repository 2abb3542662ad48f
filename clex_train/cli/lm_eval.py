"""LongBench, RULER and any other task of the `lm-eval` package on a trained model, with its own frequencies.

    python -m clex_train.cli.lm_eval run=runs/llama2_7b_clex benchmark=corpora/longbench methods=[none,ntk,clex]
    python -m clex_train.cli.lm_eval run=runs/llama2_7b_clex tasks=[longbench_qasper,longbench_hotpotqa]
    python -m clex_train.cli.lm_eval model=DIR_OR_HUB_NAME tasks=[niah_single_1,ruler_vt] lengths=[4096,16384]
    python -m clex_train.cli.lm_eval run=runs/tiny_clex tasks=[my_task] include=folder/of/yaml limit=20
    deepspeed --module clex_train.cli.lm_eval run=runs/llama2_70b_clex tasks=[longbench] sharded=true

Needs `pip install -r requirements-eval.txt`. Writes `evaluation/lm_eval/<label>.json` in the run folder (or `output`),
the table as `<label>.md`, and each task by each method in `<label>.cells/`. An existing file of other weights, tasks or
settings is kept, and the new one is `<label>_2.json`. The same command resumes an interrupted evaluation, and one with
more tasks or methods computes only those. `dry_run=true` only estimates its cost.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.cli import loading
from clex_train.cli.load_model import load, precision_of
from clex_train.config.bos import Bos
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.data.bos import adds_bos
from clex_train.evaluation.runner import work_of
from clex_train.harness import benchmark, record, requests, run, table
from clex_train.harness.arguments import LmEvalArguments, LmEvalConfig, check, longest, method_settings
from clex_train.harness.tasks import Tasks, require_installed
from clex_train.models import architecture
from clex_train.models.load import LoadedModel
from clex_train.models.tokenizer import load_tokenizer
from clex_train.preflight import evaluation_time
from clex_train.preflight.evaluation_time import Amount
from clex_train.retrieval.plan import require_chat_template
from clex_train.token_store.vocabulary import check_ids
from clex_train.tracking.summary import labelled
from clex_train.utils import distributed, log
from clex_train.utils.errors import require

if TYPE_CHECKING:
    import torch

    from clex_train.cli.loading import Source
    from clex_train.config.evaluation import EvaluationConfig
    from clex_train.harness.benchmark import Benchmark
    from clex_train.utils.protocols import Tokenizer


@log.buffered()
def main() -> None:
    """Run the tasks; names, data and bounds are checked before weights are read."""
    args: LmEvalArguments = arguments_of.parse(LmEvalConfig, sys.argv[1:])
    with arguments_of.named_as_typed(args):
        loading.check(args)
        check(args)
        _run(args)


def _run(args: LmEvalArguments) -> None:
    require_installed()
    if args.run:
        loading.run_config(Path(args.run))
    source = loading.locate(args)
    # Refuses a tokenizer with Python code of its own, which tasks such as RULER's would run without asking.
    tokenizer = load_tokenizer(args.path, source.model)
    check_ids(tokenizer, architecture.embedding_rows(architecture.to_read(source.model)), args.path)
    max_length = longest(args, source.context_len)
    require(
        args.bos is not Bos.always or adds_bos(tokenizer),
        "bos",
        args.bos.value,
        "the harness follows the tokenizer, which adds no BOS; leave the key out",
    )
    if args.chat_template:
        require_chat_template(tokenizer)
    spec = method_settings(args, source.model, source.context_len, max_length)
    found_in = benchmark.read(Path(args.benchmark)) if args.benchmark else None
    tasks = _load_tasks(args, found_in)
    tasks.require_room(max_length, args.max_prompt, _template_len(tokenizer) if args.chat_template else 0)
    loading.print_plan("lm_eval", args, source, [labelled("tasks", _describe(args, tasks, max_length))])
    reader = Reader(args, source, spec)
    settings = requests.RequestSettings(
        max_length,
        args.batch_size,
        args.limit,
        args.num_fewshot,
        bos=False if args.bos is Bos.never else None,
        in_chat=args.chat_template,
        truncation=args.cutting,
        max_prompt=args.max_prompt,
    )
    if args.dry_run:
        loaded = reader.load()
        _print_amount(args, loaded, requests.count(loaded, tasks, settings))
        return
    _evaluate(args, source, reader, tasks, settings, spec, found_in)


def _evaluate(
    args: LmEvalArguments,
    source: Source,
    reader: Reader,
    tasks: Tasks,
    settings: requests.RequestSettings,
    spec: EvaluationConfig,
    found_in: Benchmark | None,
) -> None:
    """Compute the missing cells, print the table and write the files."""
    file = source.output if args.output else source.output.parent / "lm_eval" / source.output.name
    origin = record.facts(
        args, source.model, source.label, source.context_len, tasks, reader.dtype(), settings.max_length, found_in
    )
    more = {"lm_eval": version("lm_eval")}
    kept = loading.resume_partial(args, source.model, file, origin, more)
    identity = loading.identity(args, source.model, origin) | more
    cells = record.cells(file.with_suffix(".cells"), origin, identity, tasks, found_in)
    # Without a name, the model is read as it was loaded.
    names = [""] if args.named_methods is None else [method.value for method in args.named_methods]
    without_chat = [task.name for task in found_in.tasks if not task.in_chat] if found_in else []
    found = run.evaluate(run.Job(names, spec, tasks, settings, cells, kept, without_chat), reader.load)
    if distributed.is_main():
        lines = table.lines(found, found_in, args.limit)
        text = table.page(lines, found, found_in, args.limit)
        write = partial(record.write, found=found, origin=origin, lines=lines, text=text)
        loading.write_results(args, file, origin, text, write)
    kept.remove()


class Reader:
    """Reads the weights once, when a cell needs them."""

    def __init__(self, args: LmEvalArguments, source: Source, spec: EvaluationConfig) -> None:
        self._args, self._source, self._spec = args, source, spec
        # Ranks that share weights meet while these are read, and cells are looked for by all of them.
        self._loaded = self._read() if args.sharded else None

    def dtype(self) -> torch.dtype:
        """Return the dtype of the forward pass."""
        return precision_of(self._args)

    def load(self) -> LoadedModel:
        """Return the model with its logits scaled as asked."""
        self._loaded = self._loaded or self._read()
        return self._loaded

    def _read(self) -> LoadedModel:
        loaded, _ = load(self._args, self._source.model)
        loaded.scale_logits(self._spec.log_scale or loaded.log_scale)
        return loaded


def _load_tasks(args: LmEvalArguments, found: Benchmark | None) -> Tasks:
    """Load tasks with their data; those of a benchmark by its folder alone."""
    metadata: dict[str, Any] = {"tokenizer": args.path, "pretrained": args.path}
    if args.lengths:
        metadata["max_seq_lengths"] = args.lengths
    if found is not None:
        # The folder's own index hides lm-eval's tasks of the same names, which would fetch their data.
        names = args.tasks or [task.name for task in found.tasks]
        return Tasks(names, Path(found.place), metadata, alone=True)
    return Tasks(args.tasks, Path(args.include) if args.include else None, metadata)


def _template_len(tokenizer: Tokenizer) -> int:
    """Return the tokens that the chat template adds to a question."""
    # The template of an empty question: everything that is added to any.
    turn = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text)["input_ids"])


def _print_amount(args: LmEvalArguments, loaded: LoadedModel, counted: requests.Counted) -> None:
    """Print the cost of the tasks: one forward for each prompt, and one for each generated token."""
    num_methods = len(args.named_methods or [None])
    amount = Amount(
        cells=num_methods * counted.tasks,
        forwards=num_methods * (len(counted.prompts) + counted.generated),
        tokens=num_methods * (sum(counted.prompts) + counted.generated),
        work=num_methods * sum(work_of(loaded.model, length) for length in counted.prompts),
        decoded=num_methods * counted.generated,
        cached=args.batch_size * max(counted.prompts, default=0) if counted.generated else 0,
        longest=max(counted.prompts, default=0),
    )
    evaluation_time.print_forecast(loaded, amount, evaluation_time.MOST_TIMED, False, args.sharded)


def _describe(args: LmEvalArguments, tasks: Tasks, max_length: int) -> str:
    limit = f", the first {args.limit} documents of each" if args.limit else ""
    cut = f", longer ones cut ({args.cutting.value})"
    return f"{', '.join(sorted(tasks.names))}: prompts and answers of up to {max_length:,} tokens{cut}{limit}"


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments_of.usage(__doc__, LmEvalConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="finished parts are kept, the same command resumes"))
