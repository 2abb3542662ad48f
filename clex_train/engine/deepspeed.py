"""Build a DeepSpeed engine from the typed configuration: process group, ZeRO, optimizer, learning rate.

This is the only place that writes DeepSpeed's configuration dictionary. The learning rate is a pure function of the
step and is set before each one, so a checkpoint needs no scheduler state.
"""

import atexit
import math
import os
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clex_train.config.engine import EngineConfig, Offload, Precision
from clex_train.config.optim import OptimConfig, Schedule
from clex_train.config.root import Config
from clex_train.engine import extensions, rendezvous, tiled_mlp
from clex_train.utils import distributed, log, ranks
from clex_train.utils.errors import require
from clex_train.utils.protocols import Engine

logger = log.get(__name__)


def open_process_group(engine: EngineConfig) -> None:
    """Join the launcher's process group, or open one of a single rank. NCCL on GPUs, gloo otherwise.

    Raises `ConfigError` when the named port is in use.
    """
    if distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # DeepSpeed would detect an accelerator by itself, once, at its first import.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(minutes=engine.timeout)
    if on_gpu:
        torch.cuda.set_device(distributed.device())
        # DeepSpeed takes its device from LOCAL_RANK, which is not 0 for a task bound to a single visible GPU.
        os.environ["LOCAL_RANK"] = str(distributed.device().index)
    # Now that the environment is complete, which its import reads, and before the group is open: functions defined
    # later have the group as a default argument, which keeps it alive after `distributed.close`.
    import deepspeed

    if "RANK" not in os.environ:
        _open_alone(backend, timeout)
    elif rendezvous.may_choose_port():
        rendezvous.open_at_free_port(backend, timeout)
    else:
        ranks.require_rendezvous()
        rendezvous.require_free_port()
    if not on_gpu:
        _leave_collectives_to_gloo()
        # While Python shuts down, a thread of gloo that frees the tensors of a collective ends the process by SIGABRT.
        atexit.register(distributed.close)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)


def precision(engine: EngineConfig) -> torch.dtype:
    """Return the dtype of the forward pass; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if engine.precision is Precision.auto:
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return torch.bfloat16 if engine.precision is Precision.bf16 else torch.float32


def split_batch(config: Config, world_size: int) -> tuple[int, int]:
    """Split the global batch: return (micro batch size, gradient accumulation steps).

    The global batch size `optim.batch_rows` is the same for any number of ranks. Raises `ConfigError` when it does not
    divide evenly, contradicts `engine.accumulation`, or when `world_size` is not a multiple of
    `engine.sequence_parallel`.
    """
    # The ranks of a sequence-parallel group work on the same rows, so the group counts as one reader.
    engine, rows = config.engine, config.optim.batch_rows
    groups, left_over = divmod(world_size, engine.sequence_parallel)
    require(
        left_over == 0,
        "engine.sequence_parallel",
        engine.sequence_parallel,
        f"must divide the number of ranks, {world_size}: that many ranks share each row; launch a multiple of it",
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
    """Return DeepSpeed's configuration dictionary for a training run."""
    engine = config.engine
    micro_batch, accumulation = split_batch(config, world_size)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload is not Offload.none:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload is Offload.all:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        # DeepSpeed counts each rank's micro batch, so a row of a sequence-parallel group is counted once per rank.
        "train_batch_size": config.optim.batch_rows * engine.sequence_parallel,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": precision(engine) is torch.bfloat16},
        "zero_optimization": zero,
        # Effectively never: the run's own log has these figures.
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if engine.zero_stage > 0:
        # bf16 sums of hundreds of micro-batches lose small gradients, so accumulate in fp32 (needs ZeRO >= 1).
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def build(model: nn.Module, config: Config) -> Engine:
    """Wrap a model into a DeepSpeed engine with its optimizer. Collective."""
    import deepspeed

    if config.engine.zero_stage == 3:
        _gather_once(model)
    built: tuple[Engine, ...] = deepspeed.initialize(
        model=model,
        optimizer=_optimizer(model, config),
        config=deepspeed_dict(config, distributed.world_size()),
        # `open_process_group` has done it, with this run's timeout.
        dist_init_required=False,
    )
    if config.adapter.is_used:
        _leave_out_frozen_weights(built[0])
    return built[0]


def inference_dict(engine: EngineConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration for inference: ZeRO-3, with parameters on the host if `offload=all`."""
    zero: dict[str, Any] = {"stage": 3}
    if engine.offload is Offload.all:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        # Unused without an optimizer, but DeepSpeed refuses a configuration without a batch size.
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": precision(engine) is torch.bfloat16},
        "zero_optimization": zero,
        "steps_per_print": 2**31,
    }


def build_for_inference(model: nn.Module, engine: EngineConfig) -> Any:
    """Shard a model by ZeRO-3 without an optimizer, so that each layer's weights are gathered as it runs.

    Keep the returned engine alive as long as the model. Collective, and so is every forward from then on.
    """
    import deepspeed

    return deepspeed.initialize(model=model, config=inference_dict(engine), dist_init_required=False)[0]


def consolidated_state_dict(engine: Engine) -> dict[str, torch.Tensor]:
    """Gather all weights on rank 0's CPU; return an empty dictionary on other ranks. Collective."""
    # One parameter at a time, so that the GPU holds the largest parameter and not the whole model.
    import deepspeed

    gathered = {}
    for name, parameter in engine.module.named_parameters():
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            if distributed.is_main():
                gathered[name] = parameter.detach().cpu().clone()
    return gathered


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Compute the learning rate of step `step` (0-based): linear warm-up, then cosine, linear or constant."""
    warmup_steps = round(optim.warmup * optim.steps)
    if step < warmup_steps:
        # One more in both: the first step already learns, and the peak is reached right after the warm-up.
        return optim.lr * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, optim.steps - warmup_steps)
    falling = {
        Schedule.cosine: 0.5 * (1 + math.cos(math.pi * progress)),
        Schedule.linear: 1 - progress,
        Schedule.constant: 1.0,
    }[optim.schedule]
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * falling)


def set_learning_rate(engine: Engine, value: float) -> None:
    """Set the learning rate of the next step in every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def gradient_norm(engine: Engine) -> torch.Tensor | float:
    """Return the last step's gradient norm before clipping, or 0 if unknown.

    The result may still be a device tensor; reading it synchronizes.
    """
    norm = engine.get_global_grad_norm()
    return 0.0 if norm is None else norm


def has_stepped(engine: Engine) -> bool:
    """Return True if the last step was applied, that is, its gradient was finite. The same on every rank."""
    # ZeRO's optimizers record it on the host before they step; reading the norm would wait for the whole step.
    if engine.zero_optimization_stage() > 0:
        return bool(engine.was_step_applied())
    return math.isfinite(gradient_norm(engine))


def _open_alone(backend: str, timeout: timedelta) -> None:
    """Open a process group of this rank alone."""
    # Port 0 lets the kernel choose while binding; a port that was merely found free can be taken in between.
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _leave_collectives_to_gloo() -> None:
    """Disable DeepSpeed's shared-memory all-reduce for CPUs."""
    import deepspeed

    # That op busy-waits and takes a minute to compile. Its buffers in /dev/shm (66 MiB a rank) are named after the
    # port and outlive a killed run, so the next run on the same port can mistake them for its peers' state. DeepSpeed
    # 0.19 has no option for it; it reads this table when it connects.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _gather_once(model: nn.Module) -> None:
    """Gather the sharded weights of a tiled MLP once per call, instead of once per tile."""
    import deepspeed

    # ZeRO-3 gathers when a module is entered. The tiles run the inner layers many times, while the MLP runs once.
    for module in model.modules():
        if tiled_mlp.is_tiled(module):
            for parameter in module.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


def _leave_out_frozen_weights(engine: Any) -> None:
    """Make an engine's checkpoints hold the trained parameters alone, and load such checkpoints."""
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    # The others keep the values that they were built with; `adapters.frozen_weights` compares those.
    engine.load_checkpoint = partial(engine.load_checkpoint, load_module_strict=False)


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
    """Group parameters so that matrices decay and vectors (norms, biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": trainable, "weight_decay": 0.0}]
    # Under ZeRO-3 a parameter is an empty tensor between gathers; `ds_shape` has its real shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) <= 1]
    # ZeRO flattens the tensors of each group and fails on an empty one.
    return [
        g
        for g in ({"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0})
        if g["params"]
    ]
