"""Forward pass of a micro-batch: inputs, attention, frequencies, positions and loss, chosen once for a run.

`build_forward_pass` reads the configuration; afterwards no code checks the mode of a run. A `Layout` selects the
tokens of a row that this rank feeds to the model, `Frequencies` set the spectrum and positions of its rotary module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from clex_train.attention.document_mask import document_mask_kwargs, single_document_kwargs
from clex_train.config.scaling import Positions
from clex_train.data import shards
from clex_train.data.batch import MicroBatch, document_lengths
from clex_train.data.position_sampling import draw_batch, draw_document_batch
from clex_train.engine import token_loss
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils import distributed

if TYPE_CHECKING:
    from clex_train.config.root import Config
    from clex_train.engine.sequence_parallel import SequenceParallel
    from clex_train.models.load import LoadedModel
    from clex_train.utils.protocols import CausalLM, Engine

Frequencies = Callable[[MicroBatch, Spectrum | None], AbstractContextManager[None]]
"""Sets frequencies and positions of a micro-batch's forward and backward pass."""
SamplePositions = Callable[[MicroBatch, Spectrum], Tensor]
"""Draws positions of whole rows, float64 [B, S]."""


class Layout(Protocol):
    """Distribution of the tokens of a row over ranks."""

    size: int
    """Ranks that read the same rows."""
    index: int
    """This rank's place among them."""
    num_tokens: int | None
    """Tokens of a whole row, where a call of the model has a shard of it."""

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """Make the arguments of a causal LM, on this rank's device."""
        ...

    def attention(self, batch: MicroBatch) -> AbstractContextManager[None]:
        """Make attention see whole rows within the block."""
        ...

    def shard(self, positions: Tensor) -> Tensor:
        """Cut this rank's tokens out of [B, S]."""
        ...


class ForwardPass:
    """Loss of a micro-batch: `with conditions(batch, spectrum): loss(model, batch, weight)`, backward pass included."""

    def __init__(self, mean_nll: token_loss.Loss, layout: Layout, frequencies: Frequencies) -> None:
        self.layout = layout
        self._mean_nll, self._frequencies = mean_nll, frequencies

    @contextmanager
    def conditions(self, batch: MicroBatch, spectrum: Spectrum | None) -> Iterator[None]:
        """Set frequencies, positions and attention for the block.

        The backward pass belongs inside: with activation checkpointing it runs the layers again.
        """
        with self._frequencies(batch, spectrum), self.layout.attention(batch):
            yield

    def loss(self, model: CausalLM | Engine, batch: MicroBatch, weight: float) -> Tensor:
        """Return `weight` times the mean nll of the scored tokens under `model`, the engine or the module it wraps."""
        inputs = self.layout.inputs(batch)
        return weight * self._mean_nll(model, distributed.to_device(batch.targets), **inputs)


def build_forward_pass(config: Config, loaded: LoadedModel, sequence: SequenceParallel | None) -> ForwardPass:
    """Choose the strategies of a run; `sequence` is its sequence parallelism, None for whole rows on every rank."""
    layout: Layout = WholeRowLayout(config) if sequence is None else SequenceParallelLayout(config, sequence)
    return ForwardPass(token_loss.choose_loss(config.engine), layout, choose_frequencies(config, loaded, layout))


class WholeRowLayout:
    """Every rank reads rows of its own."""

    size = 1
    index = 0
    num_tokens: int | None = None

    def __init__(self, config: Config) -> None:
        self._implementation = config.attention.implementation
        self._mask = self._masked if config.data.document_mask else self._joined

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return {"input_ids": distributed.to_device(batch.token_ids), **self._mask(batch)}

    def attention(self, batch: MicroBatch) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, positions: Tensor) -> Tensor:
        return positions

    def _masked(self, batch: MicroBatch) -> dict[str, Any]:
        return document_mask_kwargs(batch.masked_positions, self._implementation, distributed.device())

    def _joined(self, batch: MicroBatch) -> dict[str, Any]:
        return single_document_kwargs(batch.token_ids, self._implementation, distributed.device())


class SequenceParallelLayout:
    """The ranks of a group share each row."""

    def __init__(self, config: Config, sequence: SequenceParallel) -> None:
        self.size, self.index = sequence.size, sequence.index
        self.num_tokens: int | None = config.data.seq_len
        self._sequence, self._row_len = sequence, config.data.seq_len
        # Rows of one document need no borders, so attention is one call a row.
        self._borders: Callable[[MicroBatch], Tensor | None] = (
            self._positions if config.data.document_mask else lambda batch: None
        )

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        # A shard does not begin at position 0, which a model would take it to without `position_ids`.
        positions = self.shard(self._positions(batch))
        return {
            "input_ids": distributed.to_device(batch.token_ids),
            "position_ids": distributed.to_device(positions),
        }

    def attention(self, batch: MicroBatch) -> AbstractContextManager[None]:
        return self._sequence.attention(self._borders(batch))

    def shard(self, positions: Tensor) -> Tensor:
        return shards.shard(positions, self.index, self.size)

    def _positions(self, batch: MicroBatch) -> Tensor:
        return shards.padded_positions(batch, self._row_len, self.size)


def choose_frequencies(config: Config, loaded: LoadedModel, layout: Layout) -> Frequencies:
    """Choose between the model's own frequencies and a step's spectrum, at plain or at sampled positions."""
    handle, num_tokens = loaded.handle, layout.num_tokens
    if loaded.clex is None and loaded.formula is None:
        if num_tokens is None:
            return lambda batch, spectrum: nullcontext()
        # A model whose RoPE follows the length would take that of a shard.
        return lambda batch, spectrum: handle.fixed(num_tokens)
    if config.attention.lambda_mask:
        # The lambda mask depends on the distance between positions; preflight refuses sampled ones with it.
        return lambda batch, spectrum: handle.training(_given(spectrum), num_tokens=num_tokens)
    sample = choose_positions(config, loaded)

    def at_sampled_positions(batch: MicroBatch, spectrum: Spectrum | None) -> AbstractContextManager[None]:
        positions = layout.shard(sample(batch, _given(spectrum)))
        return handle.training(_given(spectrum), distributed.to_device(positions), num_tokens)

    return at_sampled_positions


def choose_positions(config: Config, loaded: LoadedModel) -> SamplePositions:
    """Choose how positions of whole rows are drawn: a function of the rows' indices, whichever rank reads them."""
    scaling, row_len = config.scaling, config.data.seq_len
    grid = _position_grid(config, loaded)
    options: dict[str, Any] = {
        "seed": config.seed,
        "mix_random": scaling.mix_random,
        "max_chunks": scaling.max_chunks,
    }

    def kind(spectrum: Spectrum) -> str:
        return Positions.plain.value if spectrum.as_used else scaling.positions.value

    def in_documents(batch: MicroBatch, spectrum: Spectrum) -> Tensor:
        rows, lengths = batch.row_indices.tolist(), document_lengths(batch.masked_positions)
        return draw_document_batch(kind(spectrum), rows, lengths, **grid(spectrum), **options)

    def in_rows(batch: MicroBatch, spectrum: Spectrum) -> Tensor:
        return draw_batch(kind(spectrum), batch.row_indices.tolist(), seq_len=row_len, **grid(spectrum), **options)

    return in_documents if config.data.document_mask else in_rows


def _position_grid(config: Config, loaded: LoadedModel) -> Callable[[Spectrum], dict[str, Any]]:
    """Return the grid of positions below t * L of a step: CLEX draws t; a formula's factor is the same in all steps."""
    context_len, row_len = loaded.context_len, config.data.seq_len
    if loaded.formula is None:
        return lambda spectrum: {"context_len": context_len, "t": spectrum.t}
    # Whole numbers below factor * L, which needs not be a multiple of a row.
    fixed = {"context_len": row_len, "t": round(loaded.formula.t * context_len) / row_len}
    return lambda spectrum: fixed


def _given(spectrum: Spectrum | None) -> Spectrum:
    assert spectrum is not None, "a scaled model trains at the spectrum of `parts.ode.begin(step)`"
    return spectrum
