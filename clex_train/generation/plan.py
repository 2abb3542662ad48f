"""Plan of a text: model, prompt and frequencies, checked before weights are read, and its opening block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from clex_train.config.engine import EngineConfig
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.model import ModelConfig
from clex_train.engine import deepspeed
from clex_train.evaluation import methods
from clex_train.generation import prompt, schedule
from clex_train.generation.arguments import KEYS, GenerateArguments
from clex_train.model_config import size
from clex_train.model_config.context_length import ContextLength
from clex_train.model_config.meta_models import model_on_meta
from clex_train.models import architecture, weights
from clex_train.models.directory import has_clex
from clex_train.models.tokenizer import load_tokenizer
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.native import native_handle_on_meta
from clex_train.rope.patch import RotaryHandle
from clex_train.scaling.frequency_table import TABLE, Frequencies, FrequencyTable
from clex_train.tracking import summary
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer

logger = log.get(__name__)


@dataclass(frozen=True)
class Plan:
    """A text to generate, before weights are read."""

    model: ModelConfig
    arch: PretrainedConfig
    context: ContextLength
    dtype: torch.dtype
    tokenizer: Tokenizer
    ids: list[int]
    """Tokens of the prompt, special tokens included."""
    spec: EvaluationConfig
    """The method and its settings; its only length is that of prompt and answer."""
    announced: str
    """The t of each length, in words."""


def make_plan(args: GenerateArguments, of_run: EvaluationConfig) -> Plan:
    """Check the arguments against model, tokenizer and prompt; `of_run` has the settings that they leave out.

    Raises `ConfigError` for a prompt, method or length that the model cannot be used with.
    """
    model = args.named_model()
    arch = architecture.to_read(model)
    weights.check(model, arch)
    context = architecture.context_source(model, arch)
    tokenizer = load_tokenizer(args.path, model)
    if args.chat:
        # Before standard input is read, which a person may be about to type.
        prompt.require_chat(tokenizer)
    ids = prompt.encoded(tokenizer, prompt.read(str(args.prompt_file)), args.chat, args.system)
    _check_ids(ids, architecture.embedding_rows(arch), args.path)
    settings = {key: getattr(of_run, key) for key in KEYS} | args.given(KEYS)
    # The last new token is not read, so it needs no place.
    total = len(ids) + args.max_new_tokens - 1
    spec = EvaluationConfig(methods=[args.method], lengths=[max(2, total)], **settings)
    _check_reach(args, len(ids), context.length)
    table = _frequencies(args, spec, native_handle_on_meta(arch, context.length, args.trust_remote_code))
    return Plan(
        model=model,
        arch=arch,
        context=context,
        dtype=deepspeed.precision(EngineConfig(precision=args.precision)),
        tokenizer=tokenizer,
        ids=ids,
        spec=spec,
        announced=schedule.describe(table, context.length, len(ids), args.max_new_tokens),
    )


def opening(args: GenerateArguments, plan: Plan) -> Iterator[str]:
    """Yield the lines of the opening block."""
    yield from summary.model(
        summary.Subject(
            weights=f"weights of {args.path}",
            model_type=plan.arch.model_type,
            num_parameters=size.num_parameters(model_on_meta(plan.arch, args.trust_remote_code)),
            dtype=plan.dtype,
            context_len=plan.context.length,
            context_source=plan.context.source,
        )
    )
    factor = plan.spec.t_factor
    yield summary.labelled("method", args.method.value + (f", t_factor {factor:g}" if factor is not None else ""))
    kind = "a chat" if args.chat else "plain"
    source = "standard input" if args.prompt_file == prompt.STANDARD_INPUT else args.prompt_file
    yield summary.labelled("prompt", f"{len(plan.ids):,} tokens of {source}, {kind}")
    yield summary.labelled("t", plan.announced)
    yield summary.labelled("tokens", f"at most {args.max_new_tokens:,} new ones, {_sampling(args)}")


def _sampling(args: GenerateArguments) -> str:
    if args.temperature == 0:
        return "the most likely each time"
    nucleus = f", top_p {args.top_p:g}" if args.top_p < 1 else ""
    return f"sampled at temperature {args.temperature:g}{nucleus}, seed {args.seed}"


def _check_ids(ids: list[int], num_rows: int, path: str) -> None:
    require(len(ids) > 0, "prompt_file", None, "the tokenizer makes no token of it; write more text")
    remedy = f"{path}: its tokenizer gives id {max(ids)}, but its embedding has {num_rows} rows; copy it again"
    require(max(ids) < num_rows, "prompt_file", None, remedy)


def _check_reach(args: GenerateArguments, num_prompt: int, context_len: int) -> None:
    """Raise `ConfigError` for a text beyond the model's own field."""
    t_max = architecture.t_max_of_field(args.path)
    if t_max is None and args.method in (*methods.OF_THE_MODEL, Method.none) and num_prompt > context_len:
        logger.warning(
            "the prompt has %s tokens, more than L = %s: a model that was not extended writes nonsense there; choose a "
            "method that serves longer texts, such as method=yarn",
            f"{num_prompt:,}",
            f"{context_len:,}",
        )
    if t_max is None or args.method not in methods.OF_THE_MODEL:
        return
    served = int(t_max * context_len)
    # The last new token is only printed.
    room = served - num_prompt + 1
    limit = (
        f"the model serves t_max * L = {t_max:g} * {context_len:,} = {served:,} tokens, the prompt has {num_prompt:,}"
    )
    require(room >= 1, "prompt_file", args.prompt_file, f"{limit}; shorten it, or take another method")
    require(args.max_new_tokens <= room, "max_new_tokens", args.max_new_tokens, f"{limit}; at most {room:,}")


def _frequencies(args: GenerateArguments, spec: EvaluationConfig, handle: RotaryHandle) -> Frequencies:
    """Return frequencies with the t of the text, from an architecture without weights."""
    grid, own = architecture.grid_of_field(args.path), handle.own
    try:
        methods.check(spec, handle, architecture.has_field(args.path), grid)
        if has_clex(Path(args.path)):
            own = FrequencyTable.load(Path(args.path) / TABLE)
        elif grid is not None:
            # The original's field is solved with the weights; only its grid of t matters before.
            own = FrequencyTable(grid, handle.base_inv_freq / grid[:, None])
        if isinstance(own, FrequencyTable) and spec.t_factor is not None:
            own = replace(own, t_factor=spec.t_factor)
        return methods.tables(spec.methods, base_rope(handle, own), spec.longest(), spec)[args.method.value]
    except ConfigError as error:
        if error.key != "methods":
            raise
        raise ConfigError("method", args.method.value, error.remedy) from error
    finally:
        handle.undo()
