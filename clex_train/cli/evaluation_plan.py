"""What an evaluation is going to be: arguments, checks before weights are read, and what shapes the numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clex_train.cli.keys import METHOD_KEYS, LoadingConfig
from clex_train.cli.loading import Source, check, locate, run_config
from clex_train.config.docs import with_overrides
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.config.root import Config, default_lengths
from clex_train.console import arguments as arguments_of
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
"""What of the `evaluation` group leaves the numbers as they are: when, and how much memory is taken at a time."""
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
    """What the command line and the run folder together ask for."""

    store: TokenStore
    spec: EvaluationConfig
    tokenizer: Tokenizer | None
    """None where no task needs it."""
    bos_id: int | None
    """What windows and prompts begin with; None: with their own first token."""
    request: dict[str, Any]
    """What is asked for, as far as it shapes the numbers, in the types of JSON."""


def parse(arguments: list[str]) -> EvaluateArguments:
    """`key=value` arguments as a checked config; `ConfigError` or an error of OmegaConf names the key."""
    asked: EvaluateArguments = arguments_of.parse(EvaluateConfig, arguments)
    _check(asked)
    return asked


def make_plan(asked: EvaluateArguments) -> Plan:
    """Fill in what the command line leaves open; `InputError` for a run, model or store that cannot be evaluated."""
    config = run_config(Path(asked.run)) if asked.run else Config()
    source = locate(asked)
    data = asked.data or config.evaluation.path or config.data.path
    require(data is not None, "data", data, "this run mixed several stores; name the one to evaluate on")
    store = TokenStore(str(data)).split("validation")
    tokenizer = load_tokenizer(asked.path, source.model)
    check_tokenizer(store, tokenizer)
    num_rows = architecture.embedding_rows(architecture.to_read(source.model))
    check_embedding(store, num_rows, asked.path, "data")
    said = asked.given(KEYS)
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


def request(asked: EvaluateArguments, spec: EvaluationConfig, context_len: int) -> dict[str, Any]:
    """Collect what two evaluations share if one only repeats the other, beside weights, data and dtype."""
    defaults = EvaluationConfig()
    unsaid = {*NOT_SHAPING, *(key for key in LATER if getattr(spec, key) == getattr(defaults, key))}
    shaping = {key: value for key, value in vars(spec).items() if key not in unsaid}
    shaping |= {"seed": asked.seed, "stream_tokens": asked.stream_tokens, "context_len": context_len}
    plain: dict[str, Any] = json.loads(json.dumps(shaping, default=lambda choice: choice.value))
    return plain


def _check(asked: EvaluateArguments) -> None:
    check(asked)
    require(asked.run is not None or asked.data is not None, "data", asked.data, "model=DIR needs a store, data=DIR")
    require(asked.batch_tokens is None or asked.batch_tokens >= 1, "batch_tokens", asked.batch_tokens, "at least 1")
    require_at_most(asked, "", {"batch_tokens": MOST_TOKENS, "stream_tokens": 2**40})
    require(asked.stream_tokens is None or asked.stream_tokens >= 2, "stream_tokens", asked.stream_tokens, "at least 2")
    require(0 <= asked.seed < 2**63, "seed", asked.seed, "0 or a positive integer below 2**63")
    if (
        asked.given(["offload_cache"]).get("offload_cache")
        and distributed.device().type == "cpu"
        and distributed.is_main()
    ):
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
