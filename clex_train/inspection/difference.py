"""Differences between the RoPE of two saved models: frequencies by layer type, L, magnitude, and layers."""

from collections.abc import Iterator
from dataclasses import dataclass

from clex_train.inspection import layers
from clex_train.inspection.reading import Reading
from clex_train.inspection.spectra import SAME, LayerRope, relative_difference


@dataclass(frozen=True)
class RopeDifference:
    """Difference between the frequencies of one layer type."""

    name: str | None
    """Layer type."""
    largest: float
    """Largest relative difference of theta, |theta / theta_other - 1|; inf if one is 0 or there are more pairs."""
    pair: int | None
    """Pair with that difference; None if the numbers of pairs differ."""
    pairs: tuple[int, ...]
    """Pairs that differ by more than rounding."""
    num_pairs: tuple[int, int]
    attention_factors: tuple[float, float]

    @property
    def is_same(self) -> bool:
        """True if theta and magnitude are equal up to rounding."""
        one, other = self.attention_factors
        return self.largest <= SAME and abs(one - other) <= SAME


@dataclass(frozen=True)
class Difference:
    """Differences between two models."""

    ropes: tuple[RopeDifference, ...]
    lines: tuple[str, ...]
    """Other differences, one line each: layer types, L, layers, lengths that engines serve."""

    @property
    def is_same(self) -> bool:
        """True if no number differs."""
        return not self.lines and all(rope.is_same for rope in self.ropes)


def compare(one: Reading, other: Reading) -> Difference:
    """Compare two models at the length that both were read for; a CLEX field counts before config.json."""
    by_name = {rope.name: rope for rope in other.ropes}
    shared = [(rope, by_name[rope.name]) for rope in one.ropes if rope.name in by_name]
    if not shared and len(other.ropes) == 1:
        # All layers of one model share what the other states by layer type.
        shared = [(rope, other.ropes[0]) for rope in one.ropes]
    ropes = tuple(_rope(one, mine, other, its) for mine, its in shared)
    return Difference(ropes, tuple(_lines(one, other)))


def _rope(one: Reading, mine: LayerRope, other: Reading, its: LayerRope) -> RopeDifference:
    theta, theirs = one.inv_freq(mine), other.inv_freq(its)
    factors = (one.attention_factor(mine), other.attention_factor(its))
    sizes = (len(theta), len(theirs))
    if sizes[0] != sizes[1]:
        return RopeDifference(mine.name, float("inf"), None, tuple(range(max(sizes))), sizes, factors)
    by_pair = relative_difference(theta, theirs)
    pair = int(by_pair.argmax())
    differing = tuple((by_pair > SAME).nonzero().flatten().tolist())
    return RopeDifference(mine.name, float(by_pair[pair]), pair, differing, sizes, factors)


def _lines(one: Reading, other: Reading) -> Iterator[str]:
    names = [sorted(str(rope.name or "all layers") for rope in reading.ropes) for reading in (one, other)]
    if names[0] != names[1]:
        yield f"layer types: {', '.join(names[0])} against {', '.join(names[1])}"
    lengths = [reading.context_len and reading.context_len.length for reading in (one, other)]
    if lengths[0] != lengths[1]:
        yield f"L: {_number(lengths[0])} against {_number(lengths[1])}"
    kinds = ["; ".join(f"{which}: {kind}" for which, kind in layers.grouped(each.layers)) for each in (one, other)]
    if kinds[0] != kinds[1]:
        yield f"layers: {kinds[0]} against {kinds[1]}"
    for mine, its in zip(one.verdicts, other.verdicts, strict=True):
        if mine.serves != its.serves:
            yield f"{mine.engine} serves {_number(mine.serves)} against {_number(its.serves)} tokens"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"
