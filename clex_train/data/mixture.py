"""Mixture of domains by weight: map row i to (domain, index in the domain) in closed form.

Domains are the leaves of a balanced binary tree. Of the first n rows that reach a node, floor(n p + 1/2) go left, with
p the weight share of the left side: the balanced (Beatty) sequence of slope p, in integers. In any run of consecutive
rows, the count of each of K domains is within ceil(log2 K) of its share: 3 rows for the usual six domains.
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
        """Count the rows that go left among the first n, rounding half up."""
        # In integers: a float quotient would drift after 2^53 rows and could differ between machines.
        return (2 * n * self.left_weight + self.weight) // (2 * self.weight)


_Node = _Fork | str


class Schedule:
    """Domain and index in the domain as functions of the row index; weights may change at given rows.

    Args:
        phases: weights by the first row at which they apply, row 0 among them; weight zero leaves a domain out.
    """

    def __init__(self, phases: Mapping[int, Weights]) -> None:
        assert 0 in phases, "the first phase begins at row 0"
        self._first_rows = sorted(phases)
        self._trees = [_tree(_integers(phases[row])) for row in self._first_rows]
        self.domains = list(phases[0])
        self._consumed = [dict.fromkeys(self.domains, 0)]
        # Rows of each domain before each phase, so that a lookup needs no pass over earlier phases.
        for tree, first, stop in zip(self._trees, self._first_rows, self._first_rows[1:], strict=False):
            grown = _counts(tree, stop - first)
            self._consumed.append({d: n + grown.get(d, 0) for d, n in self._consumed[-1].items()})

    def __call__(self, row: int) -> tuple[str, int]:
        """Return (domain, rows of this domain before `row`)."""
        phase = self._phase(row)
        node, n = self._trees[phase], row - self._first_rows[phase]
        # The row goes left if the left count grows by one from n to n + 1; O(log K) for K domains.
        while isinstance(node, _Fork):
            before = node.before(n)
            node, n = (node.left, before) if node.before(n + 1) > before else (node.right, n - before)
        return node, self._consumed[phase][node] + n

    def counts(self, num_rows: int) -> dict[str, int]:
        """Count the rows of each domain among the first `num_rows`."""
        phase = self._phase(num_rows)
        grown = _counts(self._trees[phase], num_rows - self._first_rows[phase])
        return {d: n + grown.get(d, 0) for d, n in self._consumed[phase].items()}

    def _phase(self, row: int) -> int:
        if row < 0:
            raise IndexError(f"row {row}: rows are counted from 0")
        return bisect_right(self._first_rows, row) - 1


class MixedRows:
    """Rows of several endless domain orders, interleaved by a schedule."""

    def __init__(self, domains: Mapping[str, Rows], schedule: Schedule) -> None:
        assert set(domains) == set(schedule.domains), (set(domains), schedule.domains)
        self.domains, self.schedule = domains, schedule
        (self.seq_len,) = {rows.seq_len for rows in domains.values()}

    def __len__(self) -> int:
        """Return the rows of one pass over every domain; a run reads the domains at different speeds."""
        return sum(map(len, self.domains.values()))

    def __getitem__(self, index: int) -> Row:
        """Return row `index` >= 0 of the run."""
        domain, position = self.schedule(index)
        return replace(self.domains[domain][position], index=index)


def _integers(weights: Weights) -> dict[str, int]:
    """Scale the positive weights to integers of the same proportions."""
    # Through repr: 0.1 means a tenth, not the binary float next to it, so that denominators stay small.
    fractions = {name: Fraction(repr(weight)) for name, weight in weights.items() if weight}
    unit = lcm(*(fraction.denominator for fraction in fractions.values()))
    return {name: int(fraction * unit) for name, fraction in fractions.items()}


def _tree(weights: dict[str, int]) -> _Node:
    """Build a tree with equal numbers of domains on both sides, dealing them out by descending weight."""
    # Ties are broken by name: the tree must not depend on the order of keys in the config.
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
