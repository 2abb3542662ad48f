"""Plan of the forced prompts: measures x lengths x places x prompts.

Each prompt is a pure function of (seed, measure, length, number), with the same text and fact at every place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.measures import Measure
from clex_train.measures.filler import Filler, HeldOutText, Noise
from clex_train.measures.forced_prompts import Frame, Pair, RepetitionFrame, passkey_frame, repetition_frame
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.seeding import generator

if TYPE_CHECKING:
    from clex_train.token_store.store import TokenStore

LEAST_DISTANCE = 64
"""Shortest distance of `repetition` by default, in tokens; the others are its doublings."""


@dataclass(frozen=True)
class Cell:
    """Pairs of rows of one measure at one length."""

    measure: Measure
    length: int
    """Tokens of every row, N."""
    places: tuple[float, ...]
    """Depths from 0 to 1, or distances in tokens."""
    frames: tuple[Frame, ...] = field(repr=False)
    """The fixed parts of each prompt."""
    filler: Filler = field(repr=False)
    seed: int

    @property
    def title(self) -> str:
        """Name of the measure."""
        return self.measure.value

    @property
    def num_rows(self) -> int:
        """Rows at all places together: two for each prompt."""
        return 2 * len(self.places) * len(self.frames)

    @property
    def tail_len(self) -> int:
        """Answer tokens of the longest answer."""
        return max(frame.answer_len for frame in self.frames)

    def pair(self, number: int) -> Pair:
        """Build the pair `number`: all prompts of the first place come first, then all of the second."""
        place, index = divmod(number, len(self.frames))
        frame = self.frames[index]
        # The generator does not depend on the place, so that all places have the same text around the fact.
        rng = generator(self.seed, f"measure_{self.measure.value}_text", self.length, index)
        return frame.pair(self.filler, rng, self.length - frame.num_tokens, self.places[place], index)

    def row(self, number: int) -> np.ndarray:
        """Return row `number` (0..num_rows-1), int64 [N]; the rows of a pair follow each other."""
        ids: np.ndarray = self.pair(number // 2).rows[number % 2]
        return ids


def build_cells(
    spec: EvaluationConfig, tokenizer: Tokenizer, store: TokenStore, seed: int = 0, bos_id: int | None = None
) -> list[Cell]:
    """List the cells of `evaluation.measures`, measure by measure, shorter lengths first.

    Text comes from the documents of `store`; `bos_id` begins every row. Raises `ConfigError` for a length without room,
    a distance that fits no length, a tokenizer that cannot write the prompts, or documents that are too short.
    """
    lengths = sorted(set(spec.lengths_of_tasks()))
    cells = [
        _cell(spec, measure, length, tokenizer, store, seed, [] if bos_id is None else [bos_id])
        for measure in dict.fromkeys(spec.measures)
        for length in lengths
    ]
    fitting = {place for cell in cells if cell.measure is Measure.repetition for place in cell.places}
    for distance in spec.distances or ():
        # It would be missing from every table without a word.
        remedy = f"fits none of the lengths {lengths}; leave the distance out, or name greater evaluation.task_lengths"
        require(distance in fitting, "evaluation.distances", distance, remedy)
    return cells


def _cell(
    spec: EvaluationConfig,
    measure: Measure,
    length: int,
    tokenizer: Tokenizer,
    store: TokenStore,
    seed: int,
    bos: list[int],
) -> Cell:
    makers: dict[Measure, Callable[[Tokenizer, np.random.Generator, list[int]], Frame]] = {
        Measure.forced_passkey: partial(passkey_frame, has_notice=False),
        Measure.forced_passkey_noise: partial(passkey_frame, has_notice=True),
        Measure.repetition: partial(repetition_frame, num_distractors=spec.num_distractors),
    }
    # A stream of its own for the facts: the filler takes other numbers of draws in other stores.
    frames: tuple[Frame, ...] = tuple(
        makers[measure](tokenizer, generator(seed, f"measure_{measure.value}_fact", length, index), bos)
        for index in range(spec.num_prompts)
    )
    need = max(frame.num_tokens for frame in frames)
    if need > length:
        raise ConfigError(
            "evaluation.task_lengths",
            length,
            f"{measure.value} needs at least {need} tokens for question, fact and answer; name greater lengths or "
            "leave the measure out",
        )
    # The fixed parts alone decide what fits, so no text is read here.
    places = _distances(spec, length, frames) if measure is Measure.repetition else tuple(spec.depths)
    # The prompt with the shortest parts needs the most filler, and all draw from the same documents.
    most = length - min(frame.num_tokens for frame in frames)
    is_noise = measure is Measure.forced_passkey_noise
    filler = Noise(tokenizer) if is_noise else HeldOutText(tokenizer, store=store, least=most)
    return Cell(measure, length, places, frames, filler, seed)


def _distances(spec: EvaluationConfig, length: int, frames: Sequence[Frame]) -> tuple[float, ...]:
    """Choose the distances that every prompt of this length has room for. Raises `ConfigError` if there is none."""
    # Up to half of the length: beyond, the first appearance would often be the beginning of the text.
    doublings = [LEAST_DISTANCE << k for k in range(length.bit_length()) if LEAST_DISTANCE << k <= length // 2]
    wanted = sorted(set(doublings if spec.distances is None else spec.distances))
    found = [d for d in wanted if all(frame.fits(d, length - frame.num_tokens) for frame in frames)]
    least = max(frame.least_distance for frame in frames if isinstance(frame, RepetitionFrame))
    require(
        len(found) > 0,
        "evaluation.distances" if spec.distances else "evaluation.task_lengths",
        wanted if spec.distances else length,
        f"repetition has no distance that fits {length} tokens: the statement and its distractors take {least}, and "
        f"the second appearance {max(frame.num_tokens for frame in frames)} more; name other distances or lengths",
    )
    return tuple(found)
