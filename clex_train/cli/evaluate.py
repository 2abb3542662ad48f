"""Perplexity of a trained model, or of any Hugging Face causal LM, against context length.

    python -m clex_train.cli.evaluate run=runs/tiny_clex methods=[trained,ntk]
    python -m clex_train.cli.evaluate model=path/to/model data=corpora/books lengths=[4096,8192,16384]
    python -m clex_train.cli.evaluate run=runs/tiny_base protocols=[streaming] methods=[lm_infinite]
    python -m clex_train.cli.evaluate run=runs/tiny_clex protocols=[] tasks=[passkey] depths=[0,0.5,1] num_prompts=20
    deepspeed --module clex_train.cli.evaluate run=runs/llama2_7b_clex          windows dealt to the ranks
    deepspeed --module clex_train.cli.evaluate run=runs/llama2_70b_clex sharded=true    the weights are split too

Writes `evaluation/<label>.json` in the run folder (or `output`) and prints the table. What that file holds of other
weights, data or settings stays: the new one is `<label>_2.json` then. An interrupted evaluation goes on when the same
command is given again; `dry_run=true` only says what it takes. `--help` lists every key.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

import torch

from clex_train.cli import forecast
from clex_train.cli.keys import METHOD_KEYS, MethodConfig, given
from clex_train.cli.loading import Source, check, keep, load, locate, partial_of, run_config, say_what_is_ahead
from clex_train.config.bos import Bos
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.retrieval import Task
from clex_train.config.root import Config, default_lengths
from clex_train.console import arguments as arguments_of
from clex_train.console import program
from clex_train.data.bos import evaluation_bos_id, warn_if_bos_differs
from clex_train.data.build import longest_document
from clex_train.evaluation import methods, runner, streaming
from clex_train.evaluation import provenance as origin
from clex_train.evaluation import retrieval_runner as retrieval
from clex_train.evaluation.cells import cells as cells_of_table
from clex_train.evaluation.console import tables_of
from clex_train.evaluation.partial_results import Partial, say_found
from clex_train.evaluation.protocols import Reading, readings
from clex_train.evaluation.results import NO_WINDOWS, Origin, Results, write
from clex_train.evaluation.retrieval_runner import method_cells
from clex_train.evaluation.runner import Feeding
from clex_train.evaluation.streaming import Stream, plan_stream
from clex_train.evaluation.windows import WindowSet, select
from clex_train.models import architecture
from clex_train.models.tokenizer import load_tokenizer
from clex_train.resilience import out_of_memory
from clex_train.resilience.out_of_memory import REMEDIES
from clex_train.retrieval import plan as retrieval_plan
from clex_train.retrieval.plan import Cell
from clex_train.rope.native import native_handle_on_meta
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import check_bos, check_embedding, check_tokenizer
from clex_train.tracking.summary import labelled
from clex_train.utils import distributed, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import RunStopped, require, require_at_most
from clex_train.utils.protocols import Tokenizer

WINDOW_KEYS = ("lengths", "protocols", "stride", "last_k", "num_windows", "chunk_len")
TASK_KEYS = ("tasks", "task_lengths", "depths", "num_prompts", "chat_template")
KEYS = (*METHOD_KEYS, *WINDOW_KEYS, *TASK_KEYS, "offload_cache", "bos")
"""What the command line may say otherwise than the run's `evaluation` group."""
NOT_SHAPING = ("every", "path", "allow_overlap", "chunk_len", "offload_cache", "bos")
"""What of the `evaluation` group leaves the numbers as they are: when, and how much memory is taken at a time."""
LATER = ("lm_infinite_top_k", "lm_infinite_top_k_layer", "chat_template", "method_options")
"""Keys that older files lack; they are the same request where these have their defaults."""

logger = log.get(__name__)


@dataclass
class EvaluateConfig(MethodConfig):
    """Arguments of the evaluation program."""

    data: str | None = None
    """Token store whose validation split is read; by default the run's. `model` needs one."""
    lengths: list[int] | None = None
    """Window lengths in tokens; by default the run's, or, as with an empty list, 1, 2, 4, 8 and 16 times L."""
    protocols: list[Protocol] | None = None
    """`one_shot`: windows of N, t fixed by N; `chunked` (official): chunks of L through the cache, t grows; `sliding`:
    windows moved by `stride`; `per_position`: nll against position; `last_k`: a window's last tokens alone;
    `streaming`, by itself: all held-out text as one stream, beside windows of L over the same tokens."""
    bos: Bos | None = None
    """BOS at the beginning of windows and prompts. `auto`: as in the store's documents; with `model=`, as the tokenizer
    does if the store has no record of it. By default the run's."""
    stride: int | None = None
    """Tokens by which `sliding` moves its windows; by default 256."""
    last_k: int | None = None
    """Tokens at the end of the largest window that `last_k` scores; by default L."""
    stream_tokens: int | None = None
    """Tokens of a stream; by default the whole validation split."""
    num_windows: int | None = None
    """Windows of the largest length; by default the run's."""
    chunk_len: int | None = None
    """Tokens of a window per forward: bounds the memory, not the result; by default the run's."""
    batch_tokens: int | None = None
    """Tokens per forward over several windows; by default `chunk_len`."""
    offload_cache: bool | None = None
    """Cached keys and values wait in host memory and visit the GPU layer by layer: slower, for longer texts. By default
    the run's."""
    tasks: list[Task] | None = None
    """Retrieval tasks beside perplexity, or with `protocols=[]` alone; see docs/evaluation.md."""
    task_lengths: list[int] | None = None
    """Tokens of a task's prompt and answer together; by default `lengths`."""
    depths: list[float] | None = None
    """Where in the text the hidden fact stands, from 0 (start) to 1 (end); by default the run's."""
    num_prompts: int | None = None
    """Prompts of a task at each length and depth; by default the run's."""
    chat_template: bool | None = None
    """Tasks are asked as a user does in the chat template of the tokenizer, for instruct models."""
    seed: int = 0
    """Chooses the windows. Only evaluations of equal seeds compare."""


@dataclass(frozen=True)
class Plan(Source):
    """What the command line and the run folder together ask for."""

    store: TokenStore
    spec: EvaluationConfig
    tokenizer: Tokenizer | None
    """None where no task needs it."""
    bos_id: int | None
    """What windows and prompts begin with; None: with their own first token."""
    request: dict[str, Any]
    """What is asked for, as far as it shapes the numbers, in the types of JSON."""


Done = tuple[Results, Origin, Partial]
"""Of an evaluation: its outcome, where it comes from, and what was kept for the case of an interruption."""


@log.buffered()
def main() -> None:
    """Evaluate what the command line names; whatever can be refused is refused before weights are read."""
    asked = parse(sys.argv[1:])
    with arguments_of.named_as_typed(asked):
        _run(asked)


def _run(asked: EvaluateConfig) -> None:
    plan = make_plan(asked)
    if Protocol.streaming in plan.spec.protocols:
        text = plan_stream(plan.store, asked.stream_tokens, plan.context_len, plan.bos_id)
        say_what_is_ahead("evaluate", asked, plan, ahead_of_stream(plan, text))
        if done := stream(asked, plan, text):
            finish(asked, plan, *done)
        return
    spans = readings(plan.spec, plan.context_len)
    longest, count = max(plan.spec.lengths), plan.spec.num_windows
    windows = select(plan.store, longest, count, asked.seed, plan.bos_id) if spans else None
    cells = (
        []
        if plan.tokenizer is None
        else retrieval_plan.build_cells(plan.spec, plan.tokenizer, plan.store, asked.seed, plan.bos_id is not None)
    )
    say_what_is_ahead("evaluate", asked, plan, ahead(plan, windows, cells))
    if done := evaluate(asked, plan, windows, spans, cells):
        finish(asked, plan, *done)


def ahead(plan: Plan, windows: WindowSet | None, cells: Sequence[Cell]) -> Iterator[str]:
    """Yield the lines of the opening block about windows and prompts."""
    yield labelled("methods", ", ".join(method.value for method in plan.spec.methods))
    if windows is not None:
        lengths = ", ".join(f"{length:,}" for length in plan.spec.lengths)
        protocols = ", ".join(protocol.value for protocol in plan.spec.protocols)
        yield labelled("data", f"{plan.store.path}: {len(windows.tokens)} windows of held-out documents")
        yield labelled("perplexity", f"{protocols} at {lengths} tokens")
    if cells:
        tasks = ", ".join(dict.fromkeys(cell.name.value for cell in cells))
        lengths = ", ".join(f"{length:,}" for length in sorted({cell.length for cell in cells}))
        yield labelled("retrieval", f"{tasks} at {lengths} tokens, {plan.spec.num_prompts} prompts each")


def ahead_of_stream(plan: Plan, text: Stream) -> Iterator[str]:
    """Yield the lines of the opening block about one long text."""
    yield labelled("methods", ", ".join(method.value for method in plan.spec.methods))
    yield labelled("data", f"{plan.store.path}: a stream of {text.num_tokens:,} held-out tokens")


def finish(asked: EvaluateConfig, plan: Plan, results: Results, origin: Origin, kept: Partial) -> None:
    """Write the results and print their tables, on rank 0; `RunStopped` if nothing fitted or no file was written.

    What was kept for the case of an interruption goes when the results are written.
    """
    if results.missing and not (results.scores or results.tasks):
        raise RunStopped(f"out of memory: nothing fitted, see above ({results.missing[0].reason}); {REMEDIES}")
    if distributed.is_main():
        keep(asked, plan.output, origin, tables_of(results, origin), partial(write, results=results, origin=origin))
    kept.remove()


def parse(arguments: list[str]) -> EvaluateConfig:
    """`key=value` arguments as a checked config; `ValueError` or an error of OmegaConf names the key."""
    asked = arguments_of.parse(EvaluateConfig, arguments)
    assert isinstance(asked, EvaluateConfig)
    _check(asked)
    return asked


def make_plan(asked: EvaluateConfig) -> Plan:
    """Fill in what the command line leaves open; `ValueError` for a run, model or store that cannot be evaluated."""
    config = run_config(Path(asked.run)) if asked.run else Config()
    source = locate(asked)
    data = asked.data or config.evaluation.path or config.data.path
    require(data is not None, "data", data, "this run mixed several stores; name the one to evaluate on")
    store = TokenStore(str(data)).split("validation")
    tokenizer = load_tokenizer(asked.path, source.model)
    check_tokenizer(store, tokenizer)
    num_rows = architecture.embedding_rows(architecture.to_read(source.model))
    check_embedding(store, num_rows, asked.path, "data")
    said = given(asked, KEYS)
    if not said.get("lengths", config.evaluation.lengths):
        t_max = architecture.t_max_of_field(asked.path)
        said["lengths"] = default_lengths(source.context_len, t_max, longest_document(store))
    spec = replace(config.evaluation, **said)
    bos_id = evaluation_bos_id(spec.bos, store, None if asked.run else tokenizer, "bos")
    check_bos(bos_id, num_rows, asked.path, "bos")
    warn_if_bos_differs(store, bos_id, "bos")
    _check_streaming(spec, asked.sharded)
    _check_reach(source.model, spec, source.context_len)
    _check_methods(source.model, spec, source.context_len)
    return Plan(
        **vars(source),
        store=store,
        spec=spec,
        tokenizer=tokenizer if spec.tasks else None,
        bos_id=bos_id,
        request=request(asked, spec, source.context_len) | ({} if bos_id is None else {"bos": True}),
    )


def request(asked: EvaluateConfig, spec: EvaluationConfig, context_len: int) -> dict[str, Any]:
    """Collect what two evaluations share if one only repeats the other, beside weights, data and dtype."""
    defaults = EvaluationConfig()
    unsaid = {*NOT_SHAPING, *(key for key in LATER if getattr(spec, key) == getattr(defaults, key))}
    shaping = {key: value for key, value in vars(spec).items() if key not in unsaid}
    shaping |= {"seed": asked.seed, "stream_tokens": asked.stream_tokens, "context_len": context_len}
    plain: dict[str, Any] = json.loads(json.dumps(shaping, default=lambda choice: choice.value))
    return plain


def evaluate(
    asked: EvaluateConfig, plan: Plan, windows: WindowSet | None, spans: Sequence[Reading], cells: Sequence[Cell]
) -> Done | None:
    """Load the weights on every rank, deal windows and prompts to the ranks, score. Collective.

    A dry run ends after saying what it takes.
    """
    spec = plan.spec
    if spec.longest() > spec.chunk_len:
        # A cache grows beside what each chunk makes and frees.
        out_of_memory.release_freed_memory()
    loaded, dtype = load(asked, plan.model)
    # A vocabulary and what reading the weights left behind are tens of MiB; scoring needs neither.
    loaded.tokenizer = None
    out_of_memory.free_memory()
    tables = methods.of_model(spec, loaded)
    inserted = methods.insertions(spec, loaded.model, loaded.context_len)
    if asked.dry_run:
        amount = forecast.of_prompts(
            loaded.model, method_cells(tables, cells, loaded.context_len, inserted), spec.chunk_len
        )
        if windows is not None:
            todo = cells_of_table(tables, spans, loaded.context_len, inserted)
            feeding = Feeding(spec.chunk_len, asked.batch_tokens or spec.chunk_len, distributed.device())
            amount += forecast.of_windows(loaded.model, todo, len(windows.tokens), feeding, loaded.context_len)
        forecast.say(loaded, amount, spec.chunk_len, spec.offload_cache, asked.sharded)
        return None
    come_from = facts(plan, dtype)
    kept = resume(asked, plan, come_from, {"windows": windows.content if windows is not None else ""})
    say_found(kept, len(tables) * (sum(len(span.spans) for span in spans) + len(cells)))
    results = Results([], loaded.context_len, NO_WINDOWS)
    how: dict[str, Any] = {"inserted": inserted, "cache_on_host": spec.offload_cache, "kept": kept}
    model, handle, size = loaded.model, loaded.handle, spec.chunk_len
    if windows is not None:
        results = runner.evaluate(model, handle, tables, windows, spans, size, asked.batch_tokens, **how)
    tasks, missing = retrieval.evaluate(model, handle, tables, cells, size, **how)
    return replace(results, tasks=tasks, missing=[*results.missing, *missing]), come_from, kept


def stream(asked: EvaluateConfig, plan: Plan, text: Stream) -> Done | None:
    """Load the weights and read one long text by each method, and in windows of L; a dry run says what it takes."""
    loaded, dtype = load(asked, plan.model)
    inserted = methods.for_streams(plan.spec, loaded)
    table = methods.tables([Method.none], methods.base_rope(loaded.handle), loaded.context_len)["none"]
    loaded.handle.use(table)
    names = [method.value for method in plan.spec.methods]
    if asked.dry_run:
        amount = forecast.of_stream(loaded.model, text, names, plan.spec.chunk_len)
        forecast.say(loaded, amount, plan.spec.chunk_len, False, asked.sharded)
        return None
    come_from = facts(plan, dtype)
    kept = resume(asked, plan, come_from, {"stream": text.num_tokens})
    say_found(kept, len(names) + 1)
    with loaded.handle.pinned(1.0):
        return streaming.evaluate(loaded.model, text, names, inserted, plan.spec.chunk_len, kept), come_from, kept


def resume(asked: EvaluateConfig, plan: Plan, come_from: Origin, read: dict[str, Any]) -> Partial:
    """Find what an interrupted evaluation left that is the same in all that the last bit of a number depends on."""
    more: dict[str, Any] = {
        "bos_id": plan.bos_id,
        "chunk_len": plan.spec.chunk_len,
        "batch_tokens": asked.batch_tokens,
        "offload_cache": plan.spec.offload_cache,
    }
    if plan.spec.longrope_factors is not None:
        more["longrope_factors_content"] = Path(plan.spec.longrope_factors).read_text(encoding="utf-8")
    return partial_of(asked, plan.model, plan.output, come_from, {**more, **read})


def facts(plan: Plan, dtype: torch.dtype) -> Origin:
    """Record where the numbers come from."""
    path = Path(str(plan.model.path))
    weights = {"path": str(path), "hash": origin.weights_hash(path), "revision": plan.model.revision}
    described = origin.describe(plan.label, weights, plan.store, dtype)
    return replace(described, request={**plan.request, "dtype": described.environment["dtype"]})


def usage() -> str:
    """The module's own text and a line for every key."""
    return arguments_of.usage(__doc__, EvaluateConfig)


def _check(asked: EvaluateConfig) -> None:
    check(asked)
    require(asked.run is not None or asked.data is not None, "data", asked.data, "model=DIR needs a store, data=DIR")
    require(asked.batch_tokens is None or asked.batch_tokens >= 1, "batch_tokens", asked.batch_tokens, "at least 1")
    require_at_most(asked, "", {"batch_tokens": MOST_TOKENS, "stream_tokens": 2**40})
    require(asked.stream_tokens is None or asked.stream_tokens >= 2, "stream_tokens", asked.stream_tokens, "at least 2")
    require(0 <= asked.seed < 2**63, "seed", asked.seed, "0 or a positive integer below 2**63")
    if asked.offload_cache and distributed.device().type == "cpu" and distributed.is_main():
        logger.info("offload_cache=true changes nothing here: the model is on the CPU, and so is its cache")


def _check_streaming(spec: EvaluationConfig, sharded: bool) -> None:
    if Protocol.streaming not in spec.protocols:
        return
    names = [protocol.value for protocol in spec.protocols]
    require(len(spec.protocols) == 1, "protocols", names, "streaming reads other tokens than windows; ask for it alone")
    require(not spec.tasks, "tasks", [task.value for task in spec.tasks], "streaming goes alone; ask for tasks apart")
    known = {Method.lm_infinite, Method.none}
    remedy = "a stream goes through a cache of constant size, which lets go of those keys; leave the key out"
    require(spec.lm_infinite_top_k == 0, "lm_infinite_top_k", spec.lm_infinite_top_k, remedy)
    names = [method.value for method in spec.methods]
    require(
        set(spec.methods) <= known,
        "methods",
        names,
        "streaming knows lm_infinite and none (plain attention, whose memory grows with the stream)",
    )
    require(distributed.world_size() == 1, "protocols", ["streaming"], "one stream is read by one process")
    require(not sharded, "sharded", sharded, "streaming is read with whole weights; leave the key out")


def _check_reach(model: ModelConfig, spec: EvaluationConfig, context_len: int) -> None:
    """Refuse a length that the model's own field does not serve, while no weights have been read."""
    t_max, longest = architecture.t_max_of_field(str(model.path)), spec.longest()
    require(
        t_max is None or not {Method.trained, Method.clex} & set(spec.methods) or longest <= t_max * context_len,
        "lengths",
        [*spec.lengths, *(spec.task_lengths or [])],
        f"num_tokens={longest}: beyond t_max * L = {t_max or 1:g} * {context_len}; shorten, or leave trained out",
    )


def _check_methods(model: ModelConfig, spec: EvaluationConfig, context_len: int) -> None:
    """Refuse a method that the model cannot have, while no weights have been read."""
    arch = architecture.to_read(model)
    unloaded = native_handle_on_meta(arch, context_len, model.trust_remote_code)
    path = str(model.path)
    methods.check(spec, unloaded, architecture.has_field(path), architecture.grid_of_field(path))


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage, kept="finished parts are kept, the same command goes on"))
