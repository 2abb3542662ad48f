"""Perplexity of a trained model, or of any Hugging Face causal LM, against context length.

    python -m clex_train.cli.evaluate run=runs/tiny_clex methods=[trained,ntk]
    python -m clex_train.cli.evaluate model=path/to/model data=corpora/books lengths=[4096,8192,16384]
    python -m clex_train.cli.evaluate run=runs/tiny_base protocols=[streaming] methods=[lm_infinite]
    python -m clex_train.cli.evaluate run=runs/tiny_clex protocols=[] tasks=[passkey] depths=[0,0.5,1] num_prompts=20
    python -m clex_train.cli.evaluate run=runs/tiny_clex measures=[forced_passkey,repetition]
    deepspeed --module clex_train.cli.evaluate run=runs/llama2_7b_clex          windows split over the ranks
    deepspeed --module clex_train.cli.evaluate run=runs/llama2_70b_clex sharded=true    the weights are split too

Writes `evaluation/<label>.json` in the run folder (or `output`) and prints the table. An existing file of other
weights, data or settings is kept, and the new one is `<label>_2.json`. The same command resumes an interrupted
evaluation; `dry_run=true` only estimates its cost. `--help` lists every key.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

import torch

from clex_train.cli.evaluation_plan import EvaluateArguments, EvaluateConfig, Plan, make_plan, parse
from clex_train.cli.load_model import load
from clex_train.cli.loading import print_plan, resume_partial, write_results
from clex_train.config.evaluation import Protocol
from clex_train.config.method import Method
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.evaluation import methods, runner, streaming
from clex_train.evaluation import provenance as origin
from clex_train.evaluation import retrieval_runner as retrieval
from clex_train.evaluation.console import tables_of
from clex_train.evaluation.duplicates import method_cells
from clex_train.evaluation.grid import cells as cells_of_table
from clex_train.evaluation.partial_results import Partial, log_found
from clex_train.evaluation.protocols import Reading, readings, require_key_tokens_fit, scored_tokens
from clex_train.evaluation.results import NO_WINDOWS, Origin, Results, write
from clex_train.evaluation.runner import Feeding
from clex_train.evaluation.streaming import Stream, plan_stream
from clex_train.evaluation.windows import WindowSet, select
from clex_train.measures import plan as measure_plan
from clex_train.measures import runner as measure_runner
from clex_train.measures import tax
from clex_train.models.load import LoadedModel
from clex_train.preflight import evaluation_time
from clex_train.resilience import oom_recovery
from clex_train.resilience.oom_recovery import REMEDIES
from clex_train.retrieval import plan as retrieval_plan
from clex_train.retrieval.plan import Cell
from clex_train.rope.hf_scalings import base_rope
from clex_train.scaling.frequency_table import Frequencies
from clex_train.tracking.summary import labelled
from clex_train.utils import distributed, log
from clex_train.utils.errors import RunStopped

Done = tuple[Results, Origin, Partial]
"""Results of an evaluation, their origin, and the partial results that an interrupted evaluation would resume."""


@log.buffered()
def main() -> None:
    """Evaluate the model of the command line; refuse unusable input before weights are read."""
    args = parse(sys.argv[1:])
    with arguments_of.named_as_typed(args):
        _run(args)


def _run(args: EvaluateArguments) -> None:
    plan = make_plan(args)
    if Protocol.streaming in plan.spec.protocols:
        text = plan_stream(plan.store, args.stream_tokens, plan.context_len, plan.bos_id)
        print_plan("evaluate", args, plan, describe_stream(plan, text))
        if done := stream(args, plan, text):
            finish(args, plan, *done)
        return
    todo = choose(args, plan)
    print_plan("evaluate", args, plan, describe_tables(plan, todo))
    if done := evaluate(args, plan, todo):
        finish(args, plan, *done)


@dataclass(frozen=True)
class Todo:
    """Everything that an evaluation reads, apart from a stream."""

    windows: WindowSet | None
    readings: list[Reading]
    prompts: list[Cell]
    """Cells of retrieval by generation."""
    forced: list[measure_plan.Cell]
    """Cells of measures by teacher forcing."""


def choose(args: EvaluateArguments, plan: Plan) -> Todo:
    """Choose windows and prompts; `ConfigError` for those that do not fit, before weights are read."""
    spec, tokenizer, bos_id = plan.spec, plan.tokenizer, plan.bos_id
    spans = readings(spec, plan.context_len)
    windows = select(plan.store, max(spec.lengths), spec.num_windows, args.seed, bos_id) if spans else None
    # Files of key tokens and of a baseline name their windows, which exist only now.
    if windows is not None:
        require_key_tokens_fit(spec, spans, windows.content, plan.store.fingerprint)
    length = tax.tax_length(spec.lengths, plan.context_len)
    tokens = scored_tokens(spans, length, windows) if windows is not None else {}
    tax.require_baseline(spec.baseline, tokens, windows.content if windows is not None else "", plan.store.fingerprint)
    if tokenizer is None:
        return Todo(windows, spans, [], [])
    prompts = retrieval_plan.build_cells(spec, tokenizer, plan.store, args.seed, bos_id is not None)
    return Todo(windows, spans, prompts, measure_plan.build_cells(spec, tokenizer, plan.store, args.seed, bos_id))


def describe_methods(plan: Plan) -> str:
    """List the methods, and the keys by which they read the model in another way than it was trained for."""
    spec = plan.spec
    others = [
        *([f"t_factor {spec.t_factor:g}"] if spec.t_factor is not None else []),
        *([f"log-scaling {spec.log_scale.name}"] if spec.log_scale is not None else []),
    ]
    return ", ".join(method.value for method in spec.methods) + (f"; {', '.join(others)}" if others else "")


def describe_tables(plan: Plan, todo: Todo) -> Iterator[str]:
    """Yield the lines of the opening block about windows and prompts."""
    yield labelled("methods", describe_methods(plan))
    if todo.windows is not None:
        lengths = ", ".join(f"{length:,}" for length in plan.spec.lengths)
        protocols = ", ".join(protocol.value for protocol in plan.spec.protocols)
        yield labelled("data", f"{plan.store.path}: {len(todo.windows.tokens)} windows of held-out documents")
        yield labelled("perplexity", f"{protocols} at {lengths} tokens")
    cells = [("retrieval", cell.name.value, cell.length) for cell in todo.prompts]
    cells += [("measures", cell.measure.value, cell.length) for cell in todo.forced]
    for label in dict.fromkeys(label for label, _, _ in cells):
        names = ", ".join(dict.fromkeys(name for kind, name, _ in cells if kind == label))
        lengths = ", ".join(f"{n:,}" for n in sorted({n for kind, _, n in cells if kind == label}))
        yield labelled(label, f"{names} at {lengths} tokens, {plan.spec.num_prompts} prompts each")


def describe_stream(plan: Plan, text: Stream) -> Iterator[str]:
    """Yield the lines of the opening block about one long text."""
    yield labelled("methods", describe_methods(plan))
    yield labelled("data", f"{plan.store.path}: a stream of {text.num_tokens:,} held-out tokens")


def finish(args: EvaluateArguments, plan: Plan, results: Results, origin: Origin, kept: Partial) -> None:
    """Write the results and print their tables, on rank 0; `RunStopped` if nothing fitted or no file was written.

    Partial results are removed once the results are written.
    """
    if results.missing and not (results.scores or results.tasks or results.measures):
        raise RunStopped(f"out of memory: nothing fitted, see above ({results.missing[0].reason}); {REMEDIES}")
    if distributed.is_main():
        write_results(
            args, plan.output, origin, tables_of(results, origin), partial(write, results=results, origin=origin)
        )
    kept.remove()


def evaluate(args: EvaluateArguments, plan: Plan, todo: Todo) -> Done | None:
    """Load the weights on every rank, distribute windows and prompts over the ranks, score. Collective.

    A dry run prints the estimated cost and returns None.
    """
    spec, windows = plan.spec, todo.windows
    if spec.longest() > spec.chunk_len:
        # The cache grows while chunks allocate and free memory, so return it to the system at once.
        oom_recovery.release_freed_memory()
    loaded, dtype = load(args, plan.model)
    loaded.scale_logits(plan.spec.log_scale or loaded.log_scale)
    # Vocabulary and loader buffers take tens of MiB, and scoring needs neither.
    loaded.tokenizer = None
    oom_recovery.free_memory()
    tables = methods.model_tables(spec, loaded)
    inserted = methods.insertions(spec, loaded.model, loaded.context_len)
    feeding = Feeding(
        spec.chunk_len, args.batch_tokens or spec.chunk_len, distributed.device(), None, spec.offload_cache
    )
    if args.dry_run:
        amount = forecast(loaded, todo, tables, inserted, feeding)
        evaluation_time.print_forecast(loaded, amount, spec.chunk_len, spec.offload_cache, args.sharded)
        return None
    provenance = facts(plan, dtype)
    kept = resume(args, plan, provenance, {"windows": windows.content if windows is not None else ""})
    cells = [*todo.prompts, *todo.forced]
    log_found(kept, len(tables) * (sum(len(span.spans) for span in todo.readings) + len(cells)))
    results = Results([], loaded.context_len, NO_WINDOWS)
    how: dict[str, Any] = {"inserted": inserted, "cache_on_host": spec.offload_cache, "kept": kept}
    model, handle, size = loaded.model, loaded.handle, spec.chunk_len
    if windows is not None:
        results = runner.evaluate(model, handle, tables, windows, todo.readings, size, args.batch_tokens, **how)
    tasks, missing = retrieval.evaluate(model, handle, tables, todo.prompts, size, **how)
    feeding = replace(feeding, kept=kept)
    measures, skipped = measure_runner.evaluate(model, handle, tables, todo.forced, feeding, inserted)
    missing = [*results.missing, *missing, *skipped]
    results = replace(results, tasks=tasks, measures=measures, missing=missing)
    return tax.add(results, provenance, spec.baseline), provenance, kept


def forecast(
    loaded: LoadedModel, todo: Todo, tables: Mapping[str, Frequencies], inserted: runner.Inserted, feeding: Feeding
) -> evaluation_time.Amount:
    """Sum the cost of everything that is read."""
    model, context_len = loaded.model, loaded.context_len
    prompts = method_cells(tables, todo.prompts, context_len, inserted)
    forced = method_cells(tables, todo.forced, context_len, inserted)
    amount = evaluation_time.prompts_amount(model, prompts, feeding.chunk_len)
    amount += evaluation_time.forced_amount(model, forced, feeding)
    if todo.windows is not None:
        jobs = cells_of_table(tables, todo.readings, context_len, inserted)
        amount += evaluation_time.windows_amount(model, jobs, len(todo.windows.tokens), feeding, context_len)
    return amount


def stream(args: EvaluateArguments, plan: Plan, text: Stream) -> Done | None:
    """Load the weights and score one long text by each method, and in windows of L; a dry run prints the cost."""
    loaded, dtype = load(args, plan.model)
    loaded.scale_logits(plan.spec.log_scale or loaded.log_scale)
    inserted = methods.stream_insertions(plan.spec, loaded)
    table = methods.tables([Method.none], base_rope(loaded.handle), loaded.context_len)["none"]
    loaded.handle.use(table)
    names = [method.value for method in plan.spec.methods]
    if args.dry_run:
        amount = evaluation_time.stream_amount(loaded.model, text, names, plan.spec.chunk_len)
        evaluation_time.print_forecast(loaded, amount, plan.spec.chunk_len, False, args.sharded)
        return None
    provenance = facts(plan, dtype)
    kept = resume(args, plan, provenance, {"stream": text.num_tokens})
    log_found(kept, len(names) + 1)
    with loaded.handle.pinned(1.0):
        return streaming.evaluate(loaded.model, text, names, inserted, plan.spec.chunk_len, kept), provenance, kept


def resume(args: EvaluateArguments, plan: Plan, provenance: Origin, read: dict[str, Any]) -> Partial:
    """Load the partial results of an interrupted evaluation, if every setting that affects the numbers is equal."""
    more: dict[str, Any] = {
        "bos_id": plan.bos_id,
        "chunk_len": plan.spec.chunk_len,
        "batch_tokens": args.batch_tokens,
        "offload_cache": plan.spec.offload_cache,
    }
    if plan.spec.longrope_factors is not None:
        more["longrope_factors_content"] = Path(plan.spec.longrope_factors).read_text(encoding="utf-8")
    return resume_partial(args, plan.model, plan.output, provenance, {**more, **read})


def facts(plan: Plan, dtype: torch.dtype) -> Origin:
    """Record weights, data and settings of the evaluation."""
    path = Path(str(plan.model.path))
    weights = {"path": str(path), "hash": origin.weights_hash(path), "revision": plan.model.revision}
    described = origin.describe(plan.label, weights, plan.store, dtype)
    return replace(described, request={**plan.request, "dtype": described.environment["dtype"]})


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments_of.usage(__doc__, EvaluateConfig)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="finished parts are kept, the same command resumes"))
