"""Perplexity of one text of any length, read as a single stream under LM-Infinite in constant memory.

Every token is predicted from the starting tokens and a local window, however long the stream is. For comparison, the
same tokens are read in windows of the training length L. Shapes: `S` segments, `N` tokens of the stream.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clex_train.attention import kv_cache
from clex_train.evaluation.partial_results import Partial
from clex_train.evaluation.perplexity import evaluating, warn_of_overflow
from clex_train.evaluation.results import Results, Score, exact_score, score_key, with_standard_errors
from clex_train.evaluation.scoring_head import token_nll
from clex_train.lm_infinite.install import LmInfinite
from clex_train.token_store.store import TokenStore
from clex_train.utils import distributed, progress
from clex_train.utils.errors import ConfigError

MOST_SEGMENTS = 1024
"""Maximum number of points of the curve of nll by position."""


@dataclass(frozen=True)
class Stream:
    """The first `num_tokens` tokens of a split, with documents joined by EOS, in segments of equal length."""

    store: TokenStore
    num_tokens: int
    segment_len: int
    context_len: int
    """L in tokens. Tokens at multiples of L have no context in a window, so neither reading scores them."""
    bos_id: int | None = None
    """Id of BOS, which replaces the first token of the stream and of every window; these are not scored."""

    def read(self, first: int, last: int) -> Tensor:
        """Read tokens [first, last) as int64 [1, last - first]."""
        tokens = torch.from_numpy(self.store.tokens(first, last).astype("int64"))
        if first == 0 and self.bos_id is not None:
            tokens[0] = self.bos_id
        return tokens[None]

    @property
    def scored_per_segment(self) -> int:
        """Number of scored tokens in a segment."""
        return self.segment_len - self.segment_len // self.context_len

    def describe(self) -> dict[str, Any]:
        """Describe the scored tokens as plain JSON; the fingerprint is equal for equal tokens only."""
        begin = "" if self.bos_id is None else f"bos {self.bos_id}/"
        digest = hashlib.blake2b(f"stream/{self.num_tokens}/{self.context_len}/{begin}".encode(), digest_size=8)
        # In blocks: a stream may have more tokens than fit in memory.
        for first in range(0, self.num_tokens, 1 << 20):
            digest.update(self.store.tokens(first, min(first + (1 << 20), self.num_tokens)).astype("<i8").tobytes())
        return {
            "count": self.num_tokens // self.segment_len,
            "length": self.segment_len,
            "score_stride": self.context_len,
            "documents": [],
            "fingerprint": digest.hexdigest(),
        }


def plan_stream(store: TokenStore, num_tokens: int | None, context_len: int, bos_id: int | None = None) -> Stream:
    """Plan a stream of `num_tokens` tokens (None: the whole split), rounded down to whole segments.

    A segment is a multiple of L. Raises `ConfigError` when the split has fewer than `num_tokens`, or than L, tokens.
    """
    wanted = store.num_tokens if num_tokens is None else num_tokens
    if not context_len <= wanted <= store.num_tokens:
        raise ConfigError(
            "stream_tokens",
            wanted,
            f"{store.path} has {store.num_tokens} {store.split_name} tokens, and a stream "
            f"takes at least one window of {context_len}; name another number or a larger store",
        )
    windows = wanted // context_len
    # The shortest segment that keeps the number of points below the maximum.
    segment_len = context_len * -(-windows // MOST_SEGMENTS)
    return Stream(store, wanted // segment_len * segment_len, segment_len, context_len, bos_id)


def evaluate(
    model: nn.Module,
    stream: Stream,
    methods: Sequence[str],
    inserted: Mapping[str, Callable[[], AbstractContextManager[object]]],
    chunk_len: int,
    kept: Partial | None = None,
) -> Results:
    """Score the stream with each method (`lm_infinite`: constant cache, `none`: growing cache), and in windows of L.

    `inserted` has a context manager that installs a method. The windows are the score `none`, `windows`, at length L.
    """
    # `kept` has whole readings only: resuming in the middle of one would need the model's cache.
    kept, described = kept or Partial(), stream.describe()
    todo = [("none", "windows", stream.context_len), *((name, "streaming", stream.num_tokens) for name in methods)]
    scores = {each: kept.find([score_key(*each)], exact_score) or [] for each in todo}
    num_tokens = sum(not found for found in scores.values()) * stream.num_tokens
    with (
        evaluating(model),
        progress.bar(
            num_tokens, "evaluate streaming", is_shown=distributed.is_main(), unit="tok", unit_scale=True
        ) as bar,
    ):
        for method, protocol, length in todo:
            if scores[method, protocol, length]:
                continue
            with inserted.get(method, nullcontext)() if protocol == "streaming" else nullcontext() as handle:
                cache = handle.new_cache() if isinstance(handle, LmInfinite) else None
                parts = (
                    windowed(model, stream, chunk_len, bar)
                    if protocol == "windows"
                    else streamed(model, cache, stream, chunk_len, bar)
                )
                score = _score(method, protocol, length, parts, stream)
            score = with_standard_errors(replace(score, fingerprint=described["fingerprint"]), [])
            scores[method, protocol, length] = [score]
            kept.finish({score.key: vars(score)})
    scored = [score for found in scores.values() for score in found]
    warn_of_overflow(scored)
    return Results(scored, stream.context_len, described)


def streamed(model: nn.Module, cache: Any, stream: Stream, chunk_len: int, bar: tqdm) -> Iterator[Tensor]:
    """Yield the nll float32 [n] of the stream's tokens, `chunk_len` at a time; 0 for the first token.

    `cache` is one of constant size, or None to keep all keys. Runs on the model's device.
    """
    device = next(model.parameters()).device
    carried = torch.zeros(1)
    for first in range(0, stream.num_tokens, chunk_len):
        last = min(first + chunk_len, stream.num_tokens)
        # One token more than is fed: it is the target of the last one.
        tokens = stream.read(first, min(last + 1, stream.num_tokens)).to(device)
        # No position ids: they follow from the cache.
        output = model(input_ids=tokens[:, : last - first], use_cache=True, **kv_cache.as_kwargs(model, cache))
        cache = kv_cache.require_in_output(output)
        targets = tokens[:, 1:]
        nll = token_nll(output.logits[:, : targets.shape[1]], targets)[0].cpu()
        # Free the logits before the consumer, and the next forward, run.
        del output
        yield torch.cat((carried, nll[: last - first - 1]))
        carried = nll[last - first - 1 :]
        bar.update(last - first)


def windowed(model: nn.Module, stream: Stream, chunk_len: int, bar: tqdm) -> Iterator[Tensor]:
    """Yield the nll float32 [n] of the same tokens in windows of L, several per forward; 0 for the first of each."""
    device, context_len = next(model.parameters()).device, stream.context_len
    step = context_len * max(1, chunk_len // context_len)
    for first in range(0, stream.num_tokens, step):
        tokens = stream.read(first, min(first + step, stream.num_tokens)).view(-1, context_len).to(device)
        if stream.bos_id is not None:
            tokens[:, 0] = stream.bos_id
        nll = torch.zeros(tokens.shape)
        nll[:, 1:] = token_nll(model(input_ids=tokens, use_cache=False).logits[:, :-1], tokens[:, 1:]).cpu()
        yield nll.flatten()
        bar.update(tokens.numel())


def segment_sums(parts: Iterator[Tensor], stream: Stream) -> list[float]:
    """Sum the nll of each segment's scored tokens [S]."""
    # float64: a float32 sum over millions of tokens loses digits of the perplexity.
    sums = torch.zeros(stream.num_tokens // stream.segment_len, dtype=torch.float64)
    first = 0
    for nll in parts:
        position = torch.arange(first, first + len(nll))
        kept = nll.double().masked_fill(position % stream.context_len == 0, 0.0)
        sums.index_add_(0, position // stream.segment_len, kept)
        first += len(nll)
    assert first == stream.num_tokens, "every token of the stream has been read"
    return sums.tolist()


def _score(method: str, protocol: str, length: int, parts: Iterator[Tensor], stream: Stream) -> Score:
    """Compute the score of one reading of the stream; `length` is the largest context of a token."""
    start = time.perf_counter()
    sums = segment_sums(parts, stream)
    return Score(
        method=method,
        protocol=protocol,
        length=length,
        frequencies="none",
        t=1.0,
        window_nll=sums,
        num_tokens=len(sums) * stream.scored_per_segment,
        seconds=time.perf_counter() - start,
    )
