"""Cells of the perplexity table: which spans are read, for which protocols, and which cells equal an earlier one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from clex_train.evaluation.duplicates import identity
from clex_train.evaluation.perplexity import Predict, one_shot
from clex_train.evaluation.results import score_key
from clex_train.scaling.frequency_table import Frequencies

if TYPE_CHECKING:
    from clex_train.evaluation.protocols import Reading, Span


class Job(NamedTuple):
    """Spans of one length and their reading function, shared by one or more protocols."""

    length: int
    spans: tuple[Span, ...]
    read: Predict
    readings: tuple[Reading, ...]

    @property
    def protocols(self) -> str:
        """Names of the protocols, joined by `+`."""
        return "+".join(reading.protocol.value for reading in self.readings)

    def lengths_read(self, context_len: int) -> Iterator[int]:
        """List the numbers of tokens that determine t while a span is read."""
        yield from () if self.read is one_shot else range(context_len, self.length, context_len)
        yield self.length


@dataclass(frozen=True, eq=False)
class Cell:
    """A job under a method. Its protocols share the forward passes."""

    method: str
    table: Frequencies
    job: Job
    source: Cell | None
    """The cell that this one equals by definition; None if it has to be computed."""

    @property
    def keys(self) -> list[str]:
        """Keys of its scores."""
        return [score_key(self.method, reading.protocol.value, self.job.length) for reading in self.job.readings]

    @property
    def name(self) -> str:
        """Description for messages."""
        return f"method {self.method}, protocol {self.job.protocols}, {self.job.length} tokens"


def jobs(readings: Sequence[Reading], context_len: int) -> list[Job]:
    """Merge the spans of all protocols into jobs, shortest first; `context_len` is L in tokens."""
    found: dict[tuple[int, tuple[Span, ...], Predict], list[Reading]] = {}
    for reading in readings:
        for length, spans in reading.spans.items():
            # Up to L tokens t is constant, so both reading functions give the same numbers.
            read = one_shot if length <= context_len else reading.read
            found.setdefault((length, spans, read), []).append(reading)
    return sorted((Job(*key, tuple(served)) for key, served in found.items()), key=lambda job: job.length)


def cells(
    tables: Mapping[str, Frequencies], readings: Sequence[Reading], context_len: int, inserted: Collection[str] = ()
) -> list[Cell]:
    """List the jobs of the first method, then of the second, and so on; mark cells that equal an earlier one.

    `inserted` are the methods that change the model, and so equal no other.
    """
    todo, first = list[Cell](), dict[object, Cell]()
    for method, table in tables.items():
        for number, job in enumerate(jobs(readings, context_len)):
            # Equal frequencies at equal lengths give equal numbers: at N <= L most methods are plain RoPE.
            does = identity(method, table, job.lengths_read(context_len), context_len, inserted)
            # Only jobs of the same number are compared: others read other spans.
            cell = Cell(method, table, job, first.get((number, does)))
            first.setdefault((number, does), cell)
            todo.append(cell)
    return todo
