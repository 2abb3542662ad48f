"""Short-context tax: perplexity at L tokens against the base that was trained on, in percent.

tax = exp(mean nll of the method - mean nll of the base) - 1           over the same tokens, paired by document

At the shortest length where L is not among the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from clex_train.evaluation import results
from clex_train.evaluation.results import Origin, Results, Score, Tax
from clex_train.utils.errors import ConfigError, require

KEY = "evaluation.baseline"


def add(evaluation: Results, origin: Origin, path: str | None) -> Results:
    """Add the tax of every method and protocol against the evaluation of the base at `path`; None adds nothing.

    Raises `ConfigError` for a baseline of another store, other windows or other scored tokens.
    """
    if path is None:
        return evaluation
    base, base_origin = results.read(Path(path))
    _require_same(path, base, base_origin, str(evaluation.windows["fingerprint"]), origin.data.get("fingerprint"))
    documents = evaluation.windows["documents"]
    taxes = [_tax(score, _of_base(path, base, score), base_origin, documents) for score in short_scores(evaluation)]
    return replace(evaluation, taxes=taxes)


def require_baseline(path: str | None, tokens: Mapping[tuple[str, int], str], windows: str, store: str) -> None:
    """Raise `ConfigError` for a baseline that an evaluation cannot be compared with, before its first forward.

    `tokens` maps (protocol, length of the tax) to the fingerprint of the scored tokens; `windows` and `store` are
    fingerprints too.
    """
    if path is None:
        return
    require(len(tokens) > 0, KEY, path, "the tax is one of perplexity; name a protocol, or leave the key out")
    base, origin = results.read(Path(path))
    _require_same(path, base, origin, windows, store)
    for (protocol, length), fingerprint in tokens.items():
        _score_of(path, base, protocol, length, fingerprint)


def short_scores(evaluation: Results) -> list[Score]:
    """Return the scores at the length of the tax."""
    # Not the shortest of each row: one that ran out of memory there has no tax, instead of another one.
    length = tax_length({score.length for score in evaluation.scores}, evaluation.context_len)
    return [score for score in evaluation.scores if score.length == length]


def tax_length(lengths: Collection[int], context_len: int) -> int:
    """Return the length of the tax: L, or the shortest if L is not among `lengths`."""
    return context_len if context_len in lengths else min(lengths, default=0)


def _of_base(path: str, base: Results, score: Score) -> Score:
    return _score_of(path, base, score.protocol, score.length, score.fingerprint)


def _score_of(path: str, base: Results, protocol: str, length: int, fingerprint: str) -> Score:
    """Return the base's first method under a protocol at a length; `ConfigError` if it scored other tokens."""
    # The first: at the shortest length, at most L tokens, the base's methods are usually all plain RoPE.
    found = [score for score in base.scores if (score.protocol, score.length) == (protocol, length)]
    remedy = "evaluate the base with the same protocols, lengths and settings"
    if not found:
        raise ConfigError(KEY, path, f"holds no {protocol} at {length} tokens; {remedy}")
    require(found[0].fingerprint == fingerprint, KEY, path, f"scored other tokens under {protocol}; {remedy}")
    return found[0]


def _require_same(path: str, base: Results, origin: Origin, windows: str, store: object) -> None:
    found = origin.data.get("fingerprint")
    require(found == store, KEY, path, f"is an evaluation on another store ({found}); evaluate the base on this one")
    found = base.windows.get("fingerprint")
    remedy = f"read other windows ({found}); evaluate the base with the same longest length, num_windows, seed and bos"
    require(found == windows, KEY, path, remedy)


def _tax(score: Score, base: Score, origin: Origin, documents: list[int]) -> Tax:
    difference = results.compare(score, base, documents)
    # exp overflows float64 at 709; a model that far from its base needs no digits.
    ratio = math.exp(difference.mean_nll) if difference.mean_nll <= 700 else math.inf
    error = None if difference.standard_error is None else 100 * ratio * difference.standard_error
    return Tax(
        method=score.method,
        protocol=score.protocol,
        length=score.length,
        percent=100 * (ratio - 1) if math.isfinite(ratio) else None,
        standard_error=error if error is not None and math.isfinite(error) else None,
        note=difference.note,
        baseline=f"{origin.label}, {base.method}",
    )
