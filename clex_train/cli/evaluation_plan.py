"""Plan of an evaluation: arguments, checks before weights are read, and the settings that affect the numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clex_train.cli.loading import Source, check, locate, run_config
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config, default_lengths
from clex_train.console import arguments as arguments_of
from clex_train.console.keys import METHOD_KEYS, LoadingConfig, with_overrides
from clex_train.data.bos import evaluation_bos_id, warn_if_bos_differs
from clex_train.data.build import longest_document
from clex_train.evaluation import methods
from clex_train.models import architecture
from clex_train.models.tokenizer import load_tokenizer
from clex_train.rope.native import native_handle_on_meta
from clex_train.token_store.store import TokenStore
from clex_train.token_store.vocabulary import check_bos, check_embedding, check_tokenizer
from clex_train.utils import distributed, log
from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most
from clex_train.utils.protocols import Tokenizer

WINDOW_KEYS = ("lengths", "protocols", "stride", "last_k", "num_windows", "chunk_len")
TASK_KEYS = ("tasks", "task_lengths", "depths", "num_prompts", "chat_template")
KEYS = (*METHOD_KEYS, *WINDOW_KEYS, *TASK_KEYS, "offload_cache", "bos")
"""Keys of the `evaluation` group that the command line takes without the group's name; by default the run's."""
NOT_SHAPING = ("every", "path", "allow_overlap", "chunk_len", "offload_cache", "bos")
"""Keys of the `evaluation` group that do not affect the numbers: schedule and memory use."""
LATER = ("lm_infinite_top_k", "lm_infinite_top_k_layer", "chat_template", "method_options")
"""Keys that older files lack; they are the same request where these have their defaults."""

logger = log.get(__name__)


@dataclass
class EvaluateArguments(LoadingConfig):
    """Arguments of the evaluation program, without those of the `evaluation` group."""

    data: str | None = None
    """Token store whose validation split is read; by default the run's. `model` needs one."""
    stream_tokens: int | None = None
    """Tokens of a stream; by default the whole validation split."""
    batch_tokens: int | None = None
    """Tokens per forward over several windows; by default `chunk_len`."""
    seed: int = 0
    """Chooses the windows. Only evaluations of equal seeds compare."""


EvaluateConfig = with_overrides(EvaluateArguments, EvaluationConfig, KEYS, otherwise="By default the run's.")


@dataclass(frozen=True)
class Plan(Source):
    """Evaluation that the command line and the run folder together describe."""

    store: TokenStore
    spec: EvaluationConfig
    tokenizer: Tokenizer | None
    """None where no task needs it."""
    bos_id: int | None
    """First token of windows and prompts; None keeps their own."""
    request: dict[str, Any]
    """Settings that affect the numbers, in the types of JSON."""


def parse(arguments: list[str]) -> EvaluateArguments:
    """Parse `key=value` arguments into a checked config; `ConfigError` or an error of OmegaConf names the key."""
    args: EvaluateArguments = arguments_of.parse(EvaluateConfig, arguments)
    _check(args)
    return args


def make_plan(args: EvaluateArguments) -> Plan:
    """Fill in missing arguments from the run; `InputError` for a run, model or store that cannot be evaluated."""
    config = run_config(Path(args.run)) if args.run else Config()
    source = locate(args)
    data = args.data or config.evaluation.path or config.data.path
    require(data is not None, "data", data, "this run mixed several stores; name the one to evaluate on")
    store = TokenStore(str(data)).split("validation")
    tokenizer = load_tokenizer(args.path, source.model)
    check_tokenizer(store, tokenizer)
    num_rows = architecture.embedding_rows(architecture.to_read(source.model))
    check_embedding(store, num_rows, args.path, "data")
    given = args.given(KEYS)
    if not given.get("lengths", config.evaluation.lengths):
        t_max = architecture.t_max_of_field(args.path)
        given["lengths"] = default_lengths(source.context_len, t_max, longest_document(store))
    spec = replace(config.evaluation, **given)
    bos_id = evaluation_bos_id(spec.bos, store, None if args.run else tokenizer, "bos")
    check_bos(bos_id, num_rows, args.path, "bos")
    warn_if_bos_differs(store, bos_id, "bos")
    _check_streaming(spec, args.sharded)
    _check_reach(source.model, spec, source.context_len)
    _check_methods(source.model, spec, source.context_len)
    return Plan(
        **vars(source),
        store=store,
        spec=spec,
        tokenizer=tokenizer if spec.tasks else None,
        bos_id=bos_id,
        request=request(args, spec, source.context_len) | ({} if bos_id is None else {"bos": True}),
    )


def request(args: EvaluateArguments, spec: EvaluationConfig, context_len: int) -> dict[str, Any]:
    """Collect the settings that are equal if one evaluation repeats another, apart from weights, data and dtype."""
    defaults = EvaluationConfig()
    left_out = {*NOT_SHAPING, *(key for key in LATER if getattr(spec, key) == getattr(defaults, key))}
    shaping = {key: value for key, value in vars(spec).items() if key not in left_out}
    shaping |= {"seed": args.seed, "stream_tokens": args.stream_tokens, "context_len": context_len}
    plain: dict[str, Any] = json.loads(json.dumps(shaping, default=lambda choice: choice.value))
    return plain


def _check(args: EvaluateArguments) -> None:
    check(args)
    require(args.run is not None or args.data is not None, "data", args.data, "model=DIR needs a store, data=DIR")
    require(args.batch_tokens is None or args.batch_tokens >= 1, "batch_tokens", args.batch_tokens, "at least 1")
    require_at_most(args, "", {"batch_tokens": MOST_TOKENS, "stream_tokens": 2**40})
    require(args.stream_tokens is None or args.stream_tokens >= 2, "stream_tokens", args.stream_tokens, "at least 2")
    require(0 <= args.seed < 2**63, "seed", args.seed, "0 or a positive integer below 2**63")
    if (
        args.given(["offload_cache"]).get("offload_cache")
        and distributed.device().type == "cpu"
        and distributed.is_main()
    ):
        logger.info("offload_cache=true changes nothing here: the model is on the CPU, and so is its cache")


def _check_streaming(spec: EvaluationConfig, sharded: bool) -> None:
    if Protocol.streaming not in spec.protocols:
        return
    names = [protocol.value for protocol in spec.protocols]
    require(
        len(spec.protocols) == 1, "protocols", names, "streaming reads other tokens than windows; evaluate it alone"
    )
    require(
        not spec.tasks, "tasks", [task.value for task in spec.tasks], "streaming runs alone; evaluate tasks separately"
    )
    known = {Method.lm_infinite, Method.none}
    remedy = "a stream uses a cache of constant size, which evicts those keys; leave the key out"
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
    """Raise `ConfigError` for a length beyond the model's own field, before weights are read."""
    t_max, longest = architecture.t_max_of_field(str(model.path)), spec.longest()
    require(
        t_max is None or not {Method.trained, Method.clex} & set(spec.methods) or longest <= t_max * context_len,
        "lengths",
        [*spec.lengths, *(spec.task_lengths or [])],
        f"num_tokens={longest}: beyond t_max * L = {t_max or 1:g} * {context_len}; shorten, or leave trained out",
    )


def _check_methods(model: ModelConfig, spec: EvaluationConfig, context_len: int) -> None:
    """Raise `ConfigError` for a method that does not fit the model, before weights are read."""
    arch = architecture.to_read(model)
    unloaded = native_handle_on_meta(arch, context_len, model.trust_remote_code)
    path = str(model.path)
    methods.check(spec, unloaded, architecture.has_field(path), architecture.grid_of_field(path))
