"""Text of an inspection: a summary, a table of pairs for each layer type, and a line for each trap."""

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import torch

from clex_train.inspection import layers, spectra
from clex_train.inspection.difference import Difference, RopeDifference
from clex_train.inspection.engines.verdict import Verdict
from clex_train.inspection.reading import Reading
from clex_train.inspection.spectra import LayerRope
from clex_train.tracking import summary
from clex_train.utils import versions

ROWS = 12
"""Pairs of a table that are shown by default, evenly spaced."""
LOG_SCALING = {
    "eval": "times log n / log L beyond L in evaluation, n tokens of the sequence (log_scale=eval)",
    "always": "times log n / log L beyond L, n tokens of the sequence (log_scale=always)",
    "official": "times log n / log L at every n, the tokens of the sequence (log_scale=official)",
    "token_eval": "times log n / log L beyond L in evaluation, n keys that a query sees (log_scale=token_eval); "
    "no config.json states it",
    "token": "times log n / log L beyond L, n keys that a query sees (log_scale=token); no config.json states it",
}
"""Description of log-scaling by policy."""


def lines(reading: Reading, every_pair: bool = False) -> Iterator[str]:
    """Yield the lines about one model."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    yield f"rope      {reading.name}    {versions.OWN} {versions.own()}, {libraries}"
    yield summary.labelled("model", f"{reading.model_type} ({reading.architecture}), {len(reading.layers)} layers")
    yield summary.labelled("context", _context(reading))
    if reading.field is not None:
        yield summary.labelled("field", _field(reading))
        if reading.field.facts.log_scale in LOG_SCALING:
            yield summary.labelled("logits", LOG_SCALING[reading.field.facts.log_scale])
    for rope in reading.ropes:
        yield summary.labelled("loads", _loads(reading, rope))
    for which, kind in layers.grouped(reading.layers):
        yield summary.labelled("layers", f"{which}: {kind}")
    for rope in reading.ropes:
        yield from _pairs(reading, rope, every_pair)
    for verdict in reading.verdicts:
        yield from _verdict(verdict)


def difference_lines(one: Reading, other: Reading, difference: Difference) -> Iterator[str]:
    """Yield the lines about the differences between two models."""
    at = f"at {one.length:,} tokens"
    yield ""
    yield f"against   {other.name}, {at}"
    for reading in (one, other):
        source = f"CLEX table at t = {reading.field.spectrum.t:g}" if reading.field else "config.json"
        yield summary.labelled("compared", f"{source} of {reading.name}")
    for rope in difference.ropes:
        yield summary.labelled("theta", _rope_difference(rope))
    for line in difference.lines:
        yield summary.labelled("differs", line)
    if difference.is_same:
        yield summary.labelled("equal", "frequencies, magnitude, L, layers and lengths are the same")


def _context(reading: Reading) -> str:
    known = reading.context_len
    trained = f"L = {known.length:,} ({known.source})" if known else "L is not stated; context_len=N sets it"
    return f"{trained}; read for {reading.length:,} tokens ({reading.length_source})"


def _field(reading: Reading) -> str:
    assert reading.field is not None
    field = reading.field
    loaded = field.facts.loaded_t
    if field.facts.refused:
        stated = "which transformers refuses"
    elif loaded == field.spectrum.t:
        stated = "as config.json states it"
    elif loaded is None:
        stated = "and config.json states none of its t"
    else:
        stated = f"and config.json states t = {loaded:g}"
    return f"CLEX, t_max {field.t_max:g}: t = {field.spectrum.t:g} at {reading.length:,} tokens, {stated}"


def _loads(reading: Reading, rope: LayerRope) -> str:
    where = f"{rope.name}: " if rope.name else ""
    theta = "" if rope.rope_theta is None else f", rope_theta {rope.rope_theta:,.10g}"
    follows = ", follows the length" if rope.follows_length else ""
    scaled = "" if rope.is_scaled else ", plain RoPE"
    return (
        f"{where}rope_type {rope.rope_type}{theta}{scaled}{follows}, rotary dimension {2 * rope.num_pairs}, "
        f"attention factor {rope.attention_factor:.6g}"
    )


def _pairs(reading: Reading, rope: LayerRope, every_pair: bool) -> Iterator[str]:
    """Yield the table of one layer type, and which of its pairs turn slowly or never."""
    used = reading.inv_freq(rope)
    titles = ["pair", "theta", "wavelength"]
    columns = [[str(j) for j in range(len(used))], [f"{x:.4g}" for x in used.tolist()], _tokens(used)]
    if reading.scales(rope):
        titles[1:] = ["CLEX theta", "wavelength", "config.json's"]
        columns.append(_tokens(rope.inv_freq))
    if rope.plain is not None:
        titles.append("x plain")
        columns.append([_ratio(x) for x in (rope.plain / used).tolist()])
    titles.append(f"turns in {reading.length:,}")
    columns.append([f"{x:.4g}" for x in (used * reading.length / (2 * math.pi)).tolist()])
    if rope.plain is not None and reading.context_len is not None:
        titles.append("context")
        reached = spectra.contexts(used, rope.plain, reading.context_len.length)
        columns.append([_length(x) for x in reached.tolist()])
    yield ""
    yield f"  pairs{f' of {rope.name}' if rope.name else ''}: tokens of a full turn"
    yield from _table(titles, columns, _shown(len(used), every_pair))
    yield from _slow(reading, rope)


def _slow(reading: Reading, rope: LayerRope) -> Iterator[str]:
    used = reading.inv_freq(rope)
    still, slow = spectra.still_pairs(used, reading.length), spectra.slow_pairs(used, reading.length)
    if still:
        yield summary.labelled("still", f"pairs {layers.ranges(still)} never turn: they carry no position")
    if slow:
        yield summary.labelled("slow", f"pairs {layers.ranges(slow)} turn less than once in {reading.length:,} tokens")
    if rope.plain is None or reading.context_len is None:
        return
    reached = spectra.contexts(used, rope.plain, reading.context_len.length)
    known = reached[torch.isfinite(reached)]
    if len(known):
        # Pairs that are scaled alike are equal up to rounding: the first of them stands for all.
        shortest, pair = round(float(known.min())), int((reached <= known.min() * (1 + spectra.SAME)).int().argmax())
        yield summary.labelled("reach", f"{shortest:,} tokens until a phase that L did not show (pair {pair})")


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield ""
    serves = "any length" if verdict.serves is None else f"serves {verdict.serves:,} tokens"
    yield f"  {verdict.engine}: {serves} ({verdict.why})"
    if not verdict.traps:
        yield "    no trap known"
    for trap in verdict.traps:
        yield f"    ! {trap.text}; remedy: {trap.remedy}"


def _rope_difference(rope: RopeDifference) -> str:
    where = f"{rope.name}: " if rope.name else ""
    one, other = rope.attention_factors
    magnitude = "" if abs(one - other) <= spectra.SAME else f"; attention factor {one:.6g} against {other:.6g}"
    if rope.pair is None:
        return f"{where}{rope.num_pairs[0]} pairs against {rope.num_pairs[1]}{magnitude}"
    if not rope.pairs:
        return f"{where}the same in all {rope.num_pairs[0]} pairs{magnitude}"
    return (
        f"{where}differs by up to {100 * rope.largest:.4g} % (pair {rope.pair}), in pairs "
        f"{layers.ranges(rope.pairs)} of {rope.num_pairs[0]}{magnitude}"
    )


def _shown(count: int, every_pair: bool) -> list[int]:
    if every_pair or count <= ROWS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)})


def _table(titles: Sequence[str], columns: Sequence[Sequence[str]], shown: Sequence[int]) -> Iterator[str]:
    widths = [
        max(len(title), *(len(column[row]) for row in shown)) for title, column in zip(titles, columns, strict=True)
    ]
    for row in (titles, *([column[row] for column in columns] for row in shown)):
        yield "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _tokens(inv_freq: torch.Tensor) -> list[str]:
    return [_length(x) for x in spectra.wavelengths(inv_freq).tolist()]


def _length(tokens: float) -> str:
    if not math.isfinite(tokens):
        return "any"
    if tokens >= 1e15:
        return f"{tokens:.1e}"
    return f"{tokens:,.4g}" if tokens < 1000 else f"{round(tokens):,}"


def _ratio(ratio: float) -> str:
    return "still" if not math.isfinite(ratio) else f"{ratio:.4g}"
