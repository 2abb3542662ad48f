"""Plan of a run: its sizes, and the memory of a rank at three moments of a step.

The moments are the loss, the backward pass of the layers and the update of the optimizer. State follows the formulas of
`preflight/model_states.py`; `preflight/activations.py` counts activations and logits on the architecture itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from clex_train.config.attention import AttentionImplementation
from clex_train.config.engine import EngineConfig
from clex_train.config.method import Method
from clex_train.config.root import Config
from clex_train.config.scaling import Drift
from clex_train.data.shards import part_len
from clex_train.engine import deepspeed as engines
from clex_train.model_config import size
from clex_train.preflight import meta_model, model_states, sequence_parallel
from clex_train.preflight.activations import Footprint
from clex_train.preflight.model_states import MemoryUse
from clex_train.scaling.clex import Clex
from clex_train.scaling.methods.base import Rope
from clex_train.scaling.new_field import new_field
from clex_train.tracking import summary
from clex_train.tracking.summary import Batch, Subject

if TYPE_CHECKING:
    from clex_train.adapters.trained_set import TrainedSet
    from clex_train.preflight.run_checks import Inputs, Preflight

GIB = 2**30
MOMENTS = ("loss", "layers", "update")
BESIDES = 1.5


@dataclass(frozen=True)
class Part:
    """A line of the memory table: bytes on the device at each of `MOMENTS`, and in host memory."""

    name: str
    device: tuple[float, float, float]
    host: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Sizes and memory of a run; `parts` are the memory of one rank."""

    config: Config
    """Configuration with the lengths that follow from the model."""
    subject: Subject
    counts: meta_model.Counts
    num_learned: int
    """Learned numbers of the frequencies: the field of CLEX, or one a pair with `static`."""
    batch: Batch
    on_gpu: bool
    parts: tuple[Part, ...]
    evaluation_cache: float
    """Bytes of the keys and values of the longest text that is evaluated during training; 0 for none."""
    inputs: Inputs
    adapters: TrainedSet | None = None
    """Adapters of the run; None if it trains every weight."""

    def totals(self) -> tuple[float, float, float]:
        """Sum the bytes on the device at each of `MOMENTS`."""
        loss, layers, update = (sum(column) for column in zip(*(part.device for part in self.parts), strict=True))
        return loss, layers, update

    @property
    def peak(self) -> float:
        """Most bytes on the device."""
        return max(self.totals())

    @property
    def host(self) -> float:
        """Bytes in host memory."""
        return sum(part.host for part in self.parts)


def make_plan(ready: Preflight) -> Plan:
    """Compute sizes and memory from the result of the checks."""
    config, arch, settings = ready.config, ready.arch, ready.settings
    counts, dtype = meta_model.count(ready.on_meta), engines.precision(config.engine)
    if ready.adapters:
        counts = meta_model.with_adapters(counts, ready.on_meta, ready.adapters)
    on_gpu = torch.cuda.is_available() or dtype is torch.bfloat16
    clex = _clex(config, counts)
    # Of `learn=ramp` there are two; the difference is nothing.
    of_static = len(counts.base_inv_freq) if config.scaling.name is Method.static else 0
    learned = sum(p.numel() for p in clex.parameters()) if clex else of_static
    sharding = model_states.sharding(settings, ready.world_size, dtype, config.engine.activation_checkpointing, on_gpu)
    footprint = _footprint(ready, dtype, learned > 0 and config.scaling.lr_scale > 0, on_gpu)
    return Plan(
        config=config,
        subject=Subject(
            weights=summary.weights_of(config.model, ready.model.path is not None),
            model_type=arch.model_type,
            num_parameters=size.num_parameters(ready.on_meta),
            dtype=dtype,
            context_len=ready.context.length,
            context_source=ready.context.source,
        ),
        counts=counts,
        num_learned=learned,
        batch=Batch(ready.world_size, settings["train_micro_batch_size_per_gpu"], sharding.accumulation),
        on_gpu=on_gpu,
        parts=_parts(sharding, counts, footprint, clex, _document_mask(config, arch, dtype, settings)),
        evaluation_cache=0.0 if config.evaluation.every < 0 else _cache(arch, config.evaluation.longest(), dtype),
        inputs=ready.inputs,
        adapters=ready.adapters,
    )


def _footprint(ready: Preflight, dtype: torch.dtype, learns_frequencies: bool, on_gpu: bool) -> Footprint:
    """Measure the activations of a micro batch."""
    config, engine = ready.config, ready.config.engine
    return meta_model.footprint(
        # Sizes are those of the trained architecture, which may follow the length and then takes no handle.
        ready.arch,
        rows=ready.settings["train_micro_batch_size_per_gpu"],
        tokens=part_len(config.data.seq_len, engine.sequence_parallel),
        dtype=dtype,
        attention=config.attention.implementation.value,
        # On a CPU the inputs of layers are in host memory already.
        engine=dataclasses.replace(engine, offload_activations=engine.offload_activations and on_gpu),
        learns_frequencies=learns_frequencies,
        adapter=config.adapter,
    )


def _document_mask(config: Config, arch: PretrainedConfig, dtype: torch.dtype, settings: dict[str, Any]) -> Part | None:
    """Count the document masks [rows, 1, S, S]: one of bools, and one that SDPA converts it to in each layer."""
    masked = (AttentionImplementation.sdpa, AttentionImplementation.eager)
    apart_without = config.engine.sequence_parallel > 1 or config.attention.implementation not in masked
    if not config.data.document_mask or apart_without:
        return None
    bools = settings["train_micro_batch_size_per_gpu"] * config.data.seq_len**2
    if config.engine.activation_checkpointing:
        return Part("document mask", (bools, bools * (1 + dtype.itemsize), 0.0))
    whole = bools * (1 + arch.get_text_config().num_hidden_layers * dtype.itemsize)
    return Part("document mask", (whole, whole, 0.0))


def _cache(arch: PretrainedConfig, num_tokens: int, dtype: torch.dtype) -> float:
    """Compute the bytes of the keys and values of one text in the caches of all layers."""
    _, key_heads, width = sequence_parallel.heads_of(arch)
    return float(2 * arch.get_text_config().num_hidden_layers * key_heads * width * num_tokens * dtype.itemsize)


def _clex(config: Config, counts: meta_model.Counts) -> Clex | None:
    if config.scaling.name is not Method.clex:
        return None
    # A drift changes no sizes, and the plan has no model to read YaRN's from.
    return new_field(dataclasses.replace(config.scaling, drift=Drift.ntk), Rope(counts.base_inv_freq))


def _parts(
    sharding: model_states.Sharding,
    counts: meta_model.Counts,
    footprint: Footprint,
    clex: Clex | None,
    mask: Part | None,
) -> tuple[Part, ...]:
    state = model_states.optimizer(sharding, counts.trainable)
    workspace = model_states.update_workspace(sharding, counts.trainable)
    parts = (
        _constant("parameters", model_states.parameters(sharding, counts.blocks)),
        _constant("gradients", model_states.gradients(sharding, counts.trainable)),
        Part("optimizer", (state.device, state.device, state.device + workspace.device), state.host),
        Part("activations", (footprint.activations, footprint.layers, 0.0), footprint.host),
        Part("logits", (footprint.logits, 0.0, 0.0)),
        *([mask] if mask else []),
        _constant("ODE", _ode(clex) if clex else MemoryUse(0.0)),
    )
    return parts if sharding.on_gpu else tuple(map(_in_one_memory, parts))


def _in_one_memory(part: Part) -> Part:
    """Add the host bytes to the device bytes: on a CPU they are the same memory."""
    loss, layers, update = part.device
    return Part(part.name, (loss + part.host, layers + part.host, update + part.host))


def _ode(clex: Clex) -> MemoryUse:
    num_pairs, num_hidden = clex.up.shape
    return model_states.ode(num_pairs, num_hidden, clex.num_steps)


def _constant(name: str, use: MemoryUse) -> Part:
    return Part(name, (use.device, use.device, use.device), use.host)


def memory_table(plan: Plan) -> Iterator[str]:
    """Yield the lines of the memory table of one rank, by part and moment."""
    engine, batch, seq_len = plan.config.engine, plan.batch, plan.config.data.seq_len
    yield (
        f"memory of one {'GPU' if plan.on_gpu else 'rank'} of {batch.world_size} in GiB: ZeRO-{engine.zero_stage}, "
        f"offload {engine.offload.name}, {str(plan.subject.dtype).removeprefix('torch.')}, "
        f"{batch.micro_batch} * {part_len(seq_len, engine.sequence_parallel):,} tokens"
        f"{'' if engine.sequence_parallel == 1 else f' of {seq_len:,}'}, {', '.join(_kept(engine))}"
    )
    yield f"  {'at the moment of':<16}{''.join(f'{moment:>10}' for moment in MOMENTS)}{'host':>10}"
    for part in (*plan.parts, Part("total", plan.totals(), plan.host)):
        yield f"  {part.name:<16}{''.join(f'{gib(n):>10}' for n in (*part.device, part.host))}"
    moment = MOMENTS[plan.totals().index(plan.peak)]
    remark = f"; leave about {BESIDES:g} GiB for the CUDA context, NCCL and fragmentation" if plan.on_gpu else ""
    yield f"  peak {gib(plan.peak)} GiB ({moment}){remark}"
    if plan.host >= GIB:
        yield f"  host {gib(plan.host)} GiB a rank: a node needs that for each of its ranks"


def _kept(engine: EngineConfig) -> Iterator[str]:
    """Name the settings that determine the memory of activations and logits."""
    if engine.offload_activations:
        yield "layers recomputed from the host"
    else:
        yield "layers recomputed" if engine.activation_checkpointing else "activations kept"
    for name, tile_len in (("loss", engine.tiled_loss), ("MLP", engine.tiled_mlp)):
        if tile_len is not None:
            yield f"{name} in tiles of {tile_len:,}"


def gib(count: float) -> str:
    """Format bytes in GiB with two decimals, four for small numbers, and a dash for 0."""
    value = count / GIB
    return "-" if value == 0 else f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"
