"""Generate one text: load the weights, stream the answer, say what it took."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

from clex_train.attention import kv_cache
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.root import Config
from clex_train.console import arguments as arguments_of
from clex_train.evaluation import methods
from clex_train.generation.arguments import GenerateArguments
from clex_train.generation.plan import Plan, make_plan, opening
from clex_train.generation.stream import Stream, end_tokens
from clex_train.lm_infinite.install import LmInfinite
from clex_train.models.load import LoadedModel, load_for_evaluation
from clex_train.resilience.stop_requests import Interrupted
from clex_train.tracking import summary
from clex_train.utils import distributed, log, seeding
from clex_train.utils.errors import RunStopped, is_out_of_memory


@log.buffered()
def generate(args: GenerateArguments, of_run: Config | None = None) -> None:
    """Check, print the plan, load the weights and stream the text; `of_run` is the configuration of `args.run`.

    Raises:
        ConfigError: the model cannot be used with the arguments; no weights were read.
        Interrupted: Ctrl-C ended the text, with the statistics in `kept`.
        RunStopped: the memory does not hold model and text.
    """
    with arguments_of.named_as_typed(args):
        plan = make_plan(args, of_run.evaluation if of_run else EvaluationConfig())
        title = f"generate from {args.path} on {summary.device()} ({summary.versions()})"
        summary.print_summary(title, opening(args, plan))
        try:
            loaded = load_for_evaluation(plan.model, plan.dtype, args.attention)
            loaded.model.to(distributed.device())
            stream_text(args, plan, loaded)
        except Exception as error:  # torch has several types for a full memory
            if not is_out_of_memory(error):
                raise
            raise RunStopped("out of memory: shorten the prompt, or take precision=bf16 or another GPU") from error


def stream_text(args: GenerateArguments, plan: Plan, loaded: LoadedModel) -> list[int]:
    """Write the text to standard output and its statistics to standard error; return the generated tokens."""
    stream, ends = Stream(plan.tokenizer, len(plan.ids)), end_tokens(loaded.model, plan.tokenizer)
    loaded.scale_logits(plan.spec.log_scale or loaded.log_scale)
    loaded.handle.use(methods.model_tables(plan.spec, loaded)[args.method.value])
    put_in = methods.insertions(plan.spec, loaded.model, loaded.context_len).get(args.method.value, nullcontext)
    # Nothing of the model's own generation config but its end tokens: what the command says is all that acts.
    loaded.model.generation_config = _settings(args, ends)
    torch.manual_seed(seeding.torch_seed(args.seed, "generation"))
    ids = torch.tensor([plan.ids], device=distributed.device())
    try:
        with put_in() as mask, _without_reminder():
            loaded.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), streamer=stream, **_cache(loaded, mask)
            )
    except KeyboardInterrupt as interrupt:
        stream.end()
        ended = interrupt if isinstance(interrupt, Interrupted) else Interrupted(signal.SIGINT)
        ended.kept = stream.statistics()
        raise ended from None
    reason = "an end token" if stream.ids[-1] in ends else f"max_new_tokens={args.max_new_tokens}"
    print(f"stopped by {reason}; {stream.statistics()}", file=sys.stderr, flush=True)
    return stream.ids


def _settings(args: GenerateArguments, ends: list[int]) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        # transformers' own default of top_k is 50; 0 leaves it out.
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    # One sequence needs no padding, but transformers warns without an id for it.
    padding = ends[0] if ends else 0
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens, eos_token_id=ends or None, pad_token_id=padding, **sampling
    )


def _cache(loaded: LoadedModel, mask: Any) -> dict[str, Any]:
    # LM-Infinite has a cache of constant size, unless it also attends to middle tokens and needs all keys.
    is_bounded = isinstance(mask, LmInfinite) and mask.middle is None
    return kv_cache.as_kwargs(loaded.model, mask.new_cache()) if is_bounded else {}


@contextmanager
def _without_reminder() -> Iterator[None]:
    """Silence transformers' reminder of max_position_embeddings, beyond which a scaled model is meant to read."""
    reminder = logging.getLogger("transformers.generation.stopping_criteria")
    before = reminder.level
    reminder.setLevel(logging.ERROR)
    try:
        yield
    finally:
        reminder.setLevel(before)
