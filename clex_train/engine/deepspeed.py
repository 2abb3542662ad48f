"""From the typed configuration to a DeepSpeed engine: process group, ZeRO configuration, optimizer, learning rate.

DeepSpeed's dictionary is written here and nowhere else. The learning rate is a pure function of the step and set before
each one, so there is no scheduler state to save.
"""

import math
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clex_train.config.engine import EngineConfig, Offload, Precision
from clex_train.config.optim import OptimConfig, Schedule
from clex_train.config.root import Config
from clex_train.engine import extensions, rendezvous, tiled_mlp
from clex_train.utils import distributed, log, ranks
from clex_train.utils.bounds import require
from clex_train.utils.protocols import Engine

logger = log.get(__name__)


def open_process_group(engine: EngineConfig) -> None:
    """Join the process group that the launcher describes, or open one of a single rank: NCCL on GPUs, else gloo.

    `ValueError` if the port that was named is in use.
    """
    if distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=engine.timeout)
    if on_gpu:
        torch.cuda.set_device(distributed.device())
        # DeepSpeed goes by LOCAL_RANK alone.
        os.environ["LOCAL_RANK"] = str(distributed.device().index)
    if "RANK" not in os.environ:
        _open_alone(backend, timeout)
    elif rendezvous.may_choose_port():
        rendezvous.open_at_free_port(backend, timeout)
    else:
        ranks.require_rendezvous()
        rendezvous.require_free_port()
    import deepspeed

    if not on_gpu:
        _leave_collectives_to_gloo()
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)


def precision(engine: EngineConfig) -> torch.dtype:
    """The dtype that parameters are computed in; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if engine.precision is Precision.auto:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if engine.precision is Precision.bf16 else torch.float32


def share_rows(config: Config, world_size: int) -> tuple[int, int]:
    """(rows per rank in a forward, micro-batches per step), so that `optim.batch_rows` are read by any number of ranks.

    Raises `ValueError` when the rows cannot be shared evenly, or contradict an explicit `engine.accumulation`, or when
    the ranks do not make whole groups of `engine.sequence_parallel`, which read their rows together.
    """
    engine, rows = config.engine, config.optim.batch_rows
    groups, left_over = divmod(world_size, engine.sequence_parallel)
    require(
        left_over == 0,
        "engine.sequence_parallel",
        engine.sequence_parallel,
        f"must divide the number of ranks, {world_size}: each row is shared by so many; launch a multiple of it",
    )
    readers = "ranks" if engine.sequence_parallel == 1 else "groups of engine.sequence_parallel ranks"
    together = groups * (engine.micro_batch or engine.accumulation or 1)
    named = "engine.accumulation" if engine.micro_batch is None else "engine.micro_batch"
    require(
        rows % together == 0,
        "optim.batch_rows",
        rows,
        f"must be a multiple of {named} * {readers} = {together // groups} * {groups}",
    )
    if engine.micro_batch is None:
        return rows // together, engine.accumulation or 1
    derived = rows // together
    require(
        engine.accumulation in (None, derived),
        "engine.accumulation",
        engine.accumulation,
        f"{rows} rows over {groups} {readers} need {derived}; leave it null or change one",
    )
    return engine.micro_batch, derived


def deepspeed_dict(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration for this run."""
    engine = config.engine
    micro_batch, accumulation = share_rows(config, world_size)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload is Offload.all:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        # To DeepSpeed every rank has rows of its own; those that share one count it once each.
        "train_batch_size": config.optim.batch_rows * engine.sequence_parallel,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": precision(engine) is torch.bfloat16},
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if engine.zero_stage > 0:
        # Hundreds of micro-batches summed in bfloat16 would lose the small ones. Without ZeRO it is not to be had.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build(model: nn.Module, config: Config) -> Engine:
    """Wrap a model into a DeepSpeed engine with its optimizer. Collective: every rank calls it."""
    import deepspeed

    if config.engine.zero_stage == 3:
        _gather_once(model)
    built: tuple[Engine, ...] = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, config),
        config=deepspeed_dict(config, distributed.world_size()),
        dist_init_required=False,
    )
    return built[0]


def inference_dict(engine: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration for a model that is only read: ZeRO-3, parameters on the host if `offload=all`."""
    zero: dict[str, Any] = {"stage": 3}
    if engine.offload is Offload.all:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision(engine) is torch.bfloat16},
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }


def build_for_inference(model: nn.Module, engine: EngineConfig) -> Any:
    """Have a model whose weights are sharded gather each layer's as it runs; the result is kept as long as the model.

    There is no optimizer. Collective, and so is every forward from then on.
    """
    import deepspeed

    return deepspeed.initialize(model=model, config=inference_dict(engine), dist_init_required=False)[0]


def consolidated_state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights on rank 0's CPU, one parameter at a time; empty on the other ranks. Collective."""
    import deepspeed

    gathered = {}
    for name, parameter in engine.module.named_parameters():
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            if distributed.is_main():
                gathered[name] = parameter.detach().cpu().clone()
    return gathered


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine, linear or constant."""
    warmup_steps = round(optim.warmup * optim.steps)
    if step < warmup_steps:
        return optim.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, optim.steps - warmup_steps)
    falling = {
        Schedule.cosine: 0.5 * (1 + math.cos(math.pi * progress)),
        Schedule.linear: 1 - progress,
        Schedule.constant: 1.0,
    }[optim.schedule]
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling)


def set_learning_rate(engine: Engine, value: float) -> None:
    """Set the learning rate of the step that comes next."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm(engine: Engine) -> torch.Tensor | float:
    """Of the last step, before clipping; a tensor that the device may still have to compute; 0 if not known."""
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else norm


def has_stepped(engine: Engine) -> bool:
    """Whether the last step's gradient was finite; the same on every rank.

    ZeRO's optimizers look before they step, and say so. To ask the norm itself is to wait until they have stepped.
    """
    if engine.zero_optimization_stage() > 0:
        return bool(engine.was_step_applied())
    return math.isfinite(gradient_norm(engine))


def _open_alone(backend: str, timeout: timedelta) -> None:
    """A group of this rank alone, met at the port that the kernel gives: one that was found free may not stay so."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _leave_collectives_to_gloo() -> None:
    """Strike the shared-memory all-reduce off DeepSpeed's own table of usable ops, which it reads when it connects.

    It spins instead of waiting, takes a minute to compile, and keeps its buffers in /dev/shm under the name of the
    port: a killed run leaves them (66 MiB a rank), and the next one on that port may take old state for its peers'.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _gather_once(model: nn.Module) -> None:
    """Have sharded weights of an MLP in tiles gathered with the MLP, and not with its layers for each tile again."""
    import deepspeed

    for module in model.modules():
        if tiled_mlp.is_tiled(module):
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    optim = config.optim
    groups = _decay_groups(model, optim.weight_decay)
    arguments: dict[str, Any] = {"lr": optim.lr, "betas": tuple(optim.betas), "eps": optim.eps}
    if config.engine.offload is not Offload.none:
        extensions.build("CPUAdamBuilder")
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        on_host: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **arguments)
        return on_host
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **arguments)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not. Under ZeRO-3 the shape of a parameter is kept in `ds_shape`."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trainable, "weight_decay": 0.0}]
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return [
        g
        for g in ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
        if g["params"]
    ]
