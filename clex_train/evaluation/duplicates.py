"""Recognize cells that are equal by definition, so that one of them is computed and the others are copies.

Two methods give the same scores if they rotate by the same frequencies and use the same mask: at N <= L `none`, `clex`,
`ntk` and `pi` are all plain RoPE. Frequencies are the same only if they agree to the bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from clex_train.evaluation.task_scores import task_key
from clex_train.scaling.frequency_table import Frequencies

Identity = tuple[object, ...]


class Prompts(Protocol):
    """Prompts of one task or measure at one length."""

    @property
    def title(self) -> str:
        """Name of the task or measure."""
        ...

    @property
    def length(self) -> int:
        """Tokens of a prompt with its answer."""
        ...


C = TypeVar("C", bound=Prompts)


@dataclass(frozen=True, eq=False)
class MethodCell(Generic[C]):
    """Prompts of a cell under a method."""

    method: str
    table: Frequencies
    cell: C
    source: MethodCell[C] | None
    """The one that this equals by definition; None if it has to be computed."""

    @property
    def key(self) -> str:
        """Key of its scores, also among partial results."""
        return task_key(self.cell.title, self.method, self.cell.length)


def method_cells(
    tables: Mapping[str, Frequencies], cells: Sequence[C], context_len: int, inserted: Collection[str] = ()
) -> list[MethodCell[C]]:
    """List the cells of the first method, then of the second, and so on; mark those that equal an earlier one.

    `inserted` are the methods that change the model, and so equal no other.
    """
    todo, first = list[MethodCell[C]](), dict[object, MethodCell[C]]()
    for method, table in tables.items():
        for number, cell in enumerate(cells):
            does = identity(method, table, [cell.length], context_len, inserted)
            each = MethodCell(method, table, cell, first.get((number, does)))
            first.setdefault((number, does), each)
            todo.append(each)
    return todo


def identity(
    method: str, table: Frequencies, lengths: Iterable[int], context_len: int, inserted: Collection[str]
) -> Identity:
    """Return a key of a method's effect at these numbers of tokens; equal keys give equal scores.

    `inserted` are the methods that install changes besides a table; none of them equals another method.
    """
    found = [table.least_upper_bound(num_tokens, context_len) for num_tokens in lengths]
    spectra = tuple((each.inv_freq.detach().cpu().numpy().tobytes(), each.attention_factor) for each in found)
    return (method if method in inserted else "", spectra)
