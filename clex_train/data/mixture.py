"""Several domains in one order, by weight: which one row i is of, and the how-many-eth of it, computed and not stored.

Domains are the leaves of a balanced binary tree. Of the first n rows that reach a node, floor(n p + 1/2) go left, p the
left side's share of the weight: the balanced (Beatty) sequence of slope p, in integers. So among any rows in a sequence
each domain's count is within ceil(log2 K) of its share for K domains: 3 of 1,000 rows for the usual six.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from clex_train.data.rows import Row, Rows

Weights = Mapping[str, float]


@dataclass(frozen=True)
class _Fork:
    left: _Node
    right: _Node
    left_weight: int
    weight: int

    def before(self, n: int) -> int:
        """How many of the first n rows go left."""
        return (2 * n * self.left_weight + self.weight) // (2 * self.weight)


_Node = _Fork | str


class Schedule:
    """Domain and place in the domain as functions of a row's index, under weights that may change at given rows.

    Args:
        phases: weights by the first row at which they hold, one of them row 0; zero leaves a domain out.
    """

    def __init__(self, phases: Mapping[int, Weights]) -> None:
        assert 0 in phases, "the first phase begins at row 0"
        self._first_rows = sorted(phases)
        self._trees = [_tree(_integers(phases[row])) for row in self._first_rows]
        self.domains = list(phases[0])
        self._consumed = [dict.fromkeys(self.domains, 0)]
        for tree, first, stop in zip(self._trees, self._first_rows, self._first_rows[1:], strict=False):
            grown = _counts(tree, stop - first)
            self._consumed.append({d: n + grown.get(d, 0) for d, n in self._consumed[-1].items()})

    def __call__(self, row: int) -> tuple[str, int]:
        """(domain, how many rows of this domain come before)."""
        phase = self._phase(row)
        node, n = self._trees[phase], row - self._first_rows[phase]
        while isinstance(node, _Fork):
            before = node.before(n)
            node, n = (node.left, before) if node.before(n + 1) > before else (node.right, n - before)
        return node, self._consumed[phase][node] + n

    def counts(self, num_rows: int) -> dict[str, int]:
        """Rows of each domain among the first `num_rows`."""
        phase = self._phase(num_rows)
        grown = _counts(self._trees[phase], num_rows - self._first_rows[phase])
        return {d: n + grown.get(d, 0) for d, n in self._consumed[phase].items()}

    def _phase(self, row: int) -> int:
        if row < 0:
            raise IndexError(f"row {row}: rows are counted from 0")
        return bisect_right(self._first_rows, row) - 1


class MixedRows:
    """The rows of several domains, each in its own endless order, taken in turns by a schedule."""

    def __init__(self, domains: Mapping[str, Rows], schedule: Schedule) -> None:
        assert set(domains) == set(schedule.domains), (set(domains), schedule.domains)
        self.domains, self.schedule = domains, schedule
        (self.seq_len,) = {rows.seq_len for rows in domains.values()}

    def __len__(self) -> int:
        """Rows of one pass over every domain; a run passes over the domains at different speeds."""
        return sum(map(len, self.domains.values()))

    def __getitem__(self, index: int) -> Row:
        """Row `index` >= 0 of the run."""
        domain, position = self.schedule(index)
        return replace(self.domains[domain][position], index=index)


def _integers(weights: Weights) -> dict[str, int]:
    """The positive weights as integers of the same proportions; 0.1 is a tenth, not the float nearest to it."""
    fractions = {name: Fraction(repr(weight)) for name, weight in weights.items() if weight}
    unit = lcm(*(fraction.denominator for fraction in fractions.values()))
    return {name: int(fraction * unit) for name, fraction in fractions.items()}


def _tree(weights: dict[str, int]) -> _Node:
    """Equal numbers of domains on both sides, in the order of their weights."""
    names = sorted(weights, key=lambda name: (-weights[name], name))
    if len(names) == 1:
        return names[0]
    left, right = ({name: weights[name] for name in names[side::2]} for side in (0, 1))
    return _Fork(_tree(left), _tree(right), sum(left.values()), sum(weights.values()))


def _counts(node: _Node, n: int) -> dict[str, int]:
    if isinstance(node, str):
        return {node: n}
    before = node.before(n)
    return _counts(node.left, before) | _counts(node.right, n - before)
