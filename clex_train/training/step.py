"""What the forward and backward pass of a micro-batch run under, and what the model is called with.

Frequencies of the step, positions of the rows, borders of documents, and the part of each row that this rank has.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from clex_train.attention.document_mask import document_mask_kwargs, single_document_kwargs
from clex_train.config.root import Config
from clex_train.data import shards
from clex_train.data.batch import Batch, document_lengths
from clex_train.engine.sequence_parallel import SequenceParallel
from clex_train.models.load import LoadedModel
from clex_train.scaling.position_sampling import draw_batch, draw_document_batch
from clex_train.scaling.spectrum import Spectrum
from clex_train.utils import distributed


@contextmanager
def in_force(
    config: Config, loaded: LoadedModel, batch: Batch, spectrum: Spectrum | None, sequence: SequenceParallel | None
) -> Iterator[None]:
    """The rotary module at the step's spectrum, or a formula's, with the rows' positions; attention over whole rows."""
    with _frequencies(config, loaded, batch, spectrum, sequence), _attention(config, batch, sequence):
        yield


def arguments(config: Config, batch: Batch, sequence: SequenceParallel | None) -> dict[str, Any]:
    """What a causal LM is called with for a micro-batch, on this rank's device."""
    inputs = {"input_ids": distributed.to_device(batch["input_ids"])}
    if sequence is not None:
        positions = shards.positions_of_whole_rows(batch, config.data.seq_len, sequence.size)
        mine = shards.cut(positions, sequence.index, sequence.size)
        return {**inputs, "position_ids": distributed.to_device(mine)}
    implementation, device = config.attention.implementation, distributed.device()
    if "position_ids" in batch:
        return inputs | document_mask_kwargs(batch["position_ids"], implementation, device)
    return inputs | single_document_kwargs(batch["input_ids"], implementation, device)


def _attention(config: Config, batch: Batch, sequence: SequenceParallel | None) -> AbstractContextManager[None]:
    if sequence is None:
        return nullcontext()
    has_documents = "position_ids" in batch
    return sequence.attention(
        shards.positions_of_whole_rows(batch, config.data.seq_len, sequence.size) if has_documents else None
    )


def _frequencies(
    config: Config, loaded: LoadedModel, batch: Batch, spectrum: Spectrum | None, sequence: SequenceParallel | None
) -> AbstractContextManager[None]:
    """The rotary module at the step's spectrum, or a formula's, and the rows' sampled positions; else plain RoPE."""
    spectrum_in_force = spectrum or loaded.formula
    row_len = config.data.seq_len
    if spectrum_in_force is None:
        return nullcontext() if sequence is None else loaded.handle.fixed(row_len)
    num_tokens = None if sequence is None else row_len
    if config.attention.lambda_mask:
        # The mask goes by distance, and `check_lambda_mask` has seen to it that positions are plain.
        return loaded.handle.training(spectrum_in_force, num_tokens=num_tokens)
    positions = _positions(config, loaded, batch, spectrum)
    if sequence is not None:
        positions = shards.cut(positions, sequence.index, sequence.size)
    return loaded.handle.training(spectrum_in_force, distributed.to_device(positions), num_tokens)


def _positions(config: Config, loaded: LoadedModel, batch: Batch, spectrum: Spectrum | None) -> torch.Tensor:
    """Sampled positions of the whole rows, float64 [B, S]: a function of the rows' indices, not of who has them."""
    kind, rows = config.scaling.positions.value, batch["row_index"].tolist()
    how: dict[str, Any] = {
        **_position_grid(config, loaded, spectrum),
        "seed": config.seed,
        "mix_random": config.scaling.mix_random,
        "max_chunks": config.scaling.max_chunks,
    }
    if "position_ids" in batch:
        return draw_document_batch(kind, rows, document_lengths(batch["position_ids"]), **how)
    return draw_batch(kind, rows, seq_len=config.data.seq_len, **how)


def _position_grid(config: Config, loaded: LoadedModel, spectrum: Spectrum | None) -> dict[str, float]:
    """The grid that positions are drawn from: that of CLEX, or under a formula the whole numbers below factor * L."""
    context_len, formula = loaded.context_len, loaded.formula
    if spectrum is not None:
        return {"context_len": context_len, "t": spectrum.t}
    assert formula is not None
    row_len = config.data.seq_len
    return {"context_len": row_len, "t": round(formula.t * context_len) / row_len}
