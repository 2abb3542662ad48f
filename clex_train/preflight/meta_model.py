"""A model's shape without its weights: parameters counted and memory measured on the meta device, for any size."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from clex_train.adapters import lora, trained_set
from clex_train.adapters.trained_set import TrainedSet
from clex_train.config.adapter import AdapterConfig
from clex_train.config.engine import EngineConfig
from clex_train.engine import activation_offload, token_loss
from clex_train.model_config.size import num_parameters
from clex_train.models import memory_options
from clex_train.models.memory_options import decoder_layers, recompute_layers
from clex_train.preflight.activations import Footprint, SizesOnHost, attention_by_sizes, measure
from clex_train.preflight.ulysses_memory import exchanged_by_sizes
from clex_train.rope.patch import install_rotary
from clex_train.rope.probe import find_rotary, probe
from clex_train.scaling.spectrum import Spectrum

FUSED = "sizes_of_a_fused_kernel"
AttentionInterface.register(FUSED, attention_by_sizes)


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters; `blocks` in the order of use: embedding, each layer, all others."""

    total: int
    trainable: int
    blocks: tuple[int, ...]
    base_inv_freq: Tensor
    """The model's own inverse frequencies, float64 [P]."""


def count(model: PreTrainedModel) -> Counts:
    """Count parameters, each once however many places share it; `ConfigError` for a model without RoPE."""
    rotary = find_rotary(model).module
    traits = probe(rotary, model.config)
    embedding: Any = model.get_input_embeddings()
    layers = [num_parameters(layer) for layer in decoder_layers(model)]
    total, before = num_parameters(model), num_parameters(embedding)
    return Counts(
        total=total,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        blocks=(before, *layers, total - before - sum(layers)),
        base_inv_freq=traits.base[traits.scaled].inv_freq,
    )


def with_adapters(counts: Counts, model: PreTrainedModel, trained: TrainedSet) -> Counts:
    """Add the adapters to the counts of the model below them, each to the block of its layer."""
    added = [0] * len(counts.blocks)
    for index, layer in enumerate(decoder_layers(model), start=1):
        own = {id(module) for module in layer.modules()}
        names = (name for name, module in model.named_modules() if id(module) in own)
        added[index] = sum(trained.added(name) for name in names)
    return dataclasses.replace(
        counts,
        total=counts.total + trained.num_adapter,
        trainable=trained.num_trained,
        blocks=tuple(block + more for block, more in zip(counts.blocks, added, strict=True)),
    )


def footprint(
    arch: PretrainedConfig,
    *,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    attention: str,
    engine: EngineConfig,
    learns_frequencies: bool,
    adapter: AdapterConfig | None = None,
) -> Footprint:
    """Measure the activations of a micro-batch of `rows` rows of `tokens` tokens, this rank's part of each row.

    `attention` is a back end of transformers. `engine` sets recomputation, offloading, tiles and sequence parallelism.
    With `adapter`, the weights are frozen, so that autograd keeps the inputs of adapted layers alone.

    Identical layers are measured with 2 and 3 of them and extrapolated: bytes are linear in the number of layers.
    """
    implementation = "eager" if attention == "eager" else _fused(engine.sequence_parallel)

    def measured(shape: PretrainedConfig) -> Footprint:
        model = on_meta(shape, dtype, implementation).train()
        host = SizesOnHost()
        if adapter is not None and adapter.is_used:
            lora.inject(model, trained_set.choose(model, adapter), seed=0)
        if engine.activation_checkpointing:
            recompute_layers(model)
        if engine.offload_activations:
            activation_offload.install(model, host.keeping)
        memory_options.install_tiles(model, engine)
        found = _measure(model, rows, tokens, token_loss.choose_loss(engine), learns_frequencies)
        return dataclasses.replace(found, host=host.bytes)

    num_layers = arch.get_text_config().num_hidden_layers
    if num_layers <= 3 or not _layers_are_alike(arch):
        return measured(arch)
    two, three = measured(_shortened(arch, 2)), measured(_shortened(arch, 3))
    return two.extended(three, num_layers - 2)


def _measure(
    model: PreTrainedModel, rows: int, tokens: int, loss: token_loss.Loss, learns_frequencies: bool
) -> Footprint:
    # Any L will do: nothing is scaled here, and a model with windows only may be trained unscaled.
    handle = install_rotary(model, 1)
    input_ids = torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    if not learns_frequencies:
        return measure(model, input_ids, loss)
    leaf = torch.empty_like(handle.base_inv_freq, device="meta").requires_grad_()
    positions = torch.empty(rows, tokens, dtype=torch.float64, device="meta")
    with handle.training(Spectrum(leaf), positions):
        return measure(model, input_ids, loss)


def _fused(ranks: int) -> str:
    """Return the name of a fused kernel, for sequence parallelism with the all-to-all around it."""
    if ranks == 1:
        return FUSED
    name = f"{FUSED}_over_{ranks}_ranks"
    AttentionInterface.register(name, partial(exchanged_by_sizes, ranks=ranks))
    return name


def on_meta(arch: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    # Without `trust_remote_code`, transformers asks on the terminal. The user has allowed the code of a custom config.
    allowed = not type(arch).__module__.startswith("transformers.")
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": allowed}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(arch), **options)


def _layers_are_alike(arch: PretrainedConfig) -> bool:
    return len(set(getattr(arch.get_text_config(), "layer_types", None) or [None])) == 1


def _shortened(arch: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Copy the architecture with fewer layers."""
    short = copy.deepcopy(arch)
    text = short.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]
    return short
