"""Config group `data`: token stores, packing into rows, and mixture weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from clex_train.utils.bounds import MOST_TOKENS
from clex_train.utils.errors import require, require_at_most

MOST_WEIGHT = 1e12
MOST_DIGITS = 15
"""Digits of a step or row index at most."""


class Packing(Enum):
    """Ways of making sequences of fixed length from documents."""

    concat = "concat"
    best_fit = "best_fit"
    long_documents = "long_documents"


@dataclass
class DomainConfig:
    """One store of a mixture."""

    path: str | None = None
    """Directory of the domain's token store."""
    weight: float = 1.0
    """Share of the rows relative to the other weights, from 0; 0 leaves the domain out."""


MOST = {
    "seq_len": MOST_TOKENS,
    "min_document_tokens": MOST_TOKENS,
}
"""Upper bounds that catch typing errors."""


@dataclass
class DataConfig:
    """The `data` group: stores, packing, sequence length, mixture."""

    path: str | None = None
    """Directory of a token store, written by `python -m data_prep tokenize`."""
    domains: dict[str, DomainConfig] = field(default_factory=dict)
    """Several stores instead of `path`, mixed by weight: `{book: {path: DIR, weight: 40}, code: {...}}`."""
    weights_at: dict[Any, dict[str, Any]] = field(default_factory=dict)
    """Curriculum: weights that change at a step, as `{1000: {book: 50, code: 0}}`; others keep their value."""
    seq_len: int = 0
    """Tokens of a training sequence, at least 2; 0: L, the model's own context. A store serves any length."""
    packing: Packing = Packing.concat
    """`concat`: join documents and cut; `best_fit`: fewest cuts, padded; `long_documents`: each row within one."""
    min_document_tokens: int | None = None
    """Shortest document that `long_documents` reads, in tokens; null: `seq_len`."""
    skip_rows: list[str] = field(default_factory=list)
    """Rows to leave out, by index or inclusive range: `[17,100-199]`. An index is one of `row_indices` of a batch."""
    document_mask: bool = False
    """Separate the documents of a row: no attention across them, positions (also CLEX's) from 0 in each."""

    def __post_init__(self) -> None:
        require_at_most(self, "data.", MOST)
        require(
            self.seq_len == 0 or self.seq_len >= 2,
            "data.seq_len",
            self.seq_len,
            "at least 2 tokens, one to read and one to predict; 0 uses the model's own context",
        )
        self._check_documents()
        for name, domain in self.domains.items():
            # Interpolations and `+key` additions bypass the typed mapping.
            is_domain = isinstance(domain, DomainConfig)
            require(is_domain, f"data.domains.{name}", domain, "should have path and weight: {path:STORE,weight:1}")
        self._check_weights("data.domains", ".weight", {name: domain.weight for name, domain in self.domains.items()})
        # `+data.weights_at.1000.book=50` on the command line gives string keys, YAML gives integers.
        self.weights_at = {_step(step): named for step, named in self.weights_at.items()}
        for step in sorted(self.weights_at):
            self._check_step(step)
        parse_ranges(self.skip_rows)

    def weights(self) -> dict[int, dict[str, float]]:
        """Return the weights of all domains by the step at which they change; the first step is 0, ascending."""
        current = {name: domain.weight for name, domain in self.domains.items()}
        phases = {0: current}
        for step in sorted(self.weights_at):
            current = current | self.weights_at[step]
            phases[step] = current
        return phases

    def _check_documents(self) -> None:
        shortest = self.min_document_tokens
        require(
            shortest is None or shortest >= self.seq_len,
            "data.min_document_tokens",
            shortest,
            f"a row lies within one document, which then has at least data.seq_len={self.seq_len} tokens",
        )
        require(
            shortest is None or self.packing is Packing.long_documents,
            "data.min_document_tokens",
            shortest,
            "only for data.packing=long_documents",
        )

    def _check_step(self, step: int) -> None:
        key, named = f"data.weights_at.{step}", self.weights_at[step]
        require(step >= 1, key, dict(named), "a step of at least 1; the weights before it are those of data.domains")
        # A misspelt domain would otherwise keep its old weight without notice.
        for name in named:
            require(name in self.domains, f"{key}.{name}", named[name], f"no such domain; {_known(self.domains)}")
        self._check_weights(key, "", self.weights()[step])

    def _check_weights(self, key: str, field: str, weights: dict[str, float]) -> None:
        for name, weight in weights.items():
            # A nested dict[str, float] would make OmegaConf refuse integers, so the type is checked here.
            number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            good = number and 0 <= weight <= MOST_WEIGHT
            require(good, f"{key}.{name}{field}", weight, f"a weight is a number from 0 to {MOST_WEIGHT:g}")
        # All weights zero would divide by zero in the schedule.
        require(not weights or any(weights.values()), key, weights, "at least one domain needs a weight above 0")


def parse_ranges(items: list[str]) -> list[tuple[int, int]]:
    """Parse `data.skip_rows` into disjoint ascending half-open ranges.

    Raises:
        ConfigError: an item is neither an index nor an ascending range.
    """
    merged: list[tuple[int, int]] = []
    # Merge overlapping and adjacent ranges, so that the skipped rows can be counted by a sum.
    for start, stop in sorted(map(_range, items)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _step(key: object) -> int:
    good = str(key).isdecimal() and len(str(key)) <= MOST_DIGITS
    require(good, "data.weights_at", key, "a step, from which the weights apply")
    return int(str(key))


def _range(item: str) -> tuple[int, int]:
    first, dash, last = str(item).strip().partition("-")
    digits = first.isdecimal() and (last.isdecimal() if dash else True) and max(len(first), len(last)) <= MOST_DIGITS
    require(
        digits and int(last or first) >= int(first),
        "data.skip_rows",
        item,
        "a row's index, or a range FIRST-LAST with both ends included",
    )
    return int(first), int(last or first) + 1


def _known(domains: dict[str, DomainConfig]) -> str:
    return f"data.domains has {', '.join(domains)}" if domains else "data.domains is empty"
