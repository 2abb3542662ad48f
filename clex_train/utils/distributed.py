"""Ranks, devices and collectives for the rest of the package; works unchanged in a single process.

The engine (DeepSpeed) opens the process group. Without one, every function acts for the only rank.
"""

import os
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from clex_train.utils import ranks
from clex_train.utils.errors import RunStopped, first_line, require

T = TypeVar("T")

GRACE = 0.1
"""Seconds between the end of a process group that something still holds and the end of the interpreter."""
MAKE_ROOM = "everything saved so far is intact; make room and run the same command again"


def is_initialized() -> bool:
    """Return True if a process group exists."""
    return dist.is_available() and dist.is_initialized()


def close() -> None:
    """Leave the process group, if there is one, and end its threads. It waits for no rank except in a collective."""
    if not is_initialized():
        return
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    if group() is not None:
        # The parameters of a DeepSpeed engine still hold it. Give its threads the time to free what they have finished.
        time.sleep(GRACE)


def rank() -> int:
    """Return the global rank; before the group is open, from the launcher's environment."""
    return dist.get_rank() if is_initialized() else ranks.rank_and_world_size()[0]


def world_size() -> int:
    """Return the number of ranks; before the group is open, from the launcher's environment."""
    return dist.get_world_size() if is_initialized() else ranks.rank_and_world_size()[1]


def is_main() -> bool:
    """Return True on rank 0, which prints and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this rank: its CUDA device if there is one, else the CPU.

    Raises:
        ConfigError: more ranks than visible devices, on each of them.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, visible = ranks.read_int("LOCAL_RANK", 0), torch.cuda.device_count()
    together = max(ranks.read_int(name, 1, least=1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    # With one GPU bound to each task (`srun --gpus-per-task=1`), every rank's device is cuda:0.
    is_bound = visible == 1 and (together == 1 or _has_gpu_of_its_own(os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    require(
        # NCCL reports two ranks on one GPU only later, in words of its own.
        is_bound or max(local + 1, together) <= visible,
        "LOCAL_RANK",
        local,
        f"{max(local + 1, together)} ranks on this machine, but {visible} visible GPU{'' if visible == 1 else 's'}; "
        "start as many ranks as GPUs, for example with torchrun --nproc-per-node=gpu",
    )
    return torch.device("cuda", 0 if is_bound else local)


@cache
def _has_gpu_of_its_own(devices: str) -> bool:
    """Return True if a wrapper has bound this rank to one GPU, `devices`, while the launcher sees others.

    Otherwise all ranks of torchrun or DeepSpeed's launcher see the same devices, including those a user exported.
    """
    if not devices or "," in devices:
        return False
    try:
        # The launcher is the nearest ancestor without LOCAL_RANK; wrapper scripts between inherit it.
        environments: Iterator[dict[str, str]] = (process.environ() for process in psutil.Process().parents())
        of_launcher = next(variables for variables in environments if "LOCAL_RANK" not in variables)
    # Without permission to look, trust the binding: refusing would stop valid SLURM jobs.
    except (psutil.Error, StopIteration):
        return True
    return of_launcher.get("CUDA_VISIBLE_DEVICES") != devices


def to_device(tensor: torch.Tensor, target: torch.device | None = None) -> torch.Tensor:
    """Copy a tensor to this rank's device, or `target`, without synchronizing."""
    target = target or device()
    if tensor.device.type == "cpu" and target.type == "cuda":
        # A copy from pageable memory blocks the host until it is done.
        return tensor.pin_memory().to(target, non_blocking=True)
    return tensor.to(target)


def barrier() -> None:
    """Wait until every rank has arrived."""
    if is_initialized() and world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks; the result has the device and dtype of `tensor`, which is unchanged."""
    if world_size() == 1:
        return tensor.clone()
    on_device = tensor.to(device(), copy=True)
    dist.all_reduce(on_device)
    return on_device.to(tensor.device)


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Average over ranks; bitwise equal on every rank."""
    return all_reduce_sum(tensor) / world_size()


def all_reduce_sum_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to sum a tensor over ranks and copy it to the host; return a function that waits for the result."""
    total = all_reduce_sum(tensor)
    if total.device.type == "cpu":
        return lambda: total
    host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
    host.copy_(total, non_blocking=True)
    # An event, not a stream synchronize: work queued after this call is not waited for.
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return host

    return wait


def broadcast_to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast rank 0's value to the device of every rank, without synchronizing."""
    on_device = to_device(tensor.clone())
    if world_size() > 1:
        dist.broadcast(on_device, src=0)
    return on_device


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Broadcast rank 0's value to every rank; shape and dtype must match beforehand."""
    if world_size() == 1:
        return tensor.clone()
    on_device = tensor.to(device(), copy=True)
    dist.broadcast(on_device, src=0)
    return on_device.to(tensor.device)


def broadcast_object(value: T) -> T:
    """Broadcast rank 0's small picklable object to every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def try_on_main(write: Callable[[], object]) -> OSError | None:
    """Run `write` on rank 0; return the error that stopped it, or None, on every rank. Collective."""
    failure = None
    if is_main():
        try:
            write()
        except OSError as error:
            failure = error
    # Every rank must learn of it, or the others would wait in the next collective.
    return broadcast_object(failure) if is_initialized() else failure


def write_on_main(write: Callable[[], object]) -> None:
    """Run `write` on rank 0; raise `RunStopped` on every rank if it fails, as on a full disk. Collective."""
    if (failure := try_on_main(write)) is not None:
        raise RunStopped(f"{describe_write_error(failure)}; {MAKE_ROOM}") from failure


def describe_write_error(error: OSError) -> str:
    """Name the file that could not be written, and why."""
    return f"{error.filename or 'a file of the run'}: cannot be written ({error.strerror or first_line(error)})"


def gather_objects(value: T) -> list[T]:
    """Gather the small picklable objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Gather equally shaped tensors of all ranks, stacked in rank order [ranks, ...], on every rank."""
    if world_size() == 1:
        return tensor[None].clone()
    on_device = tensor.to(device())
    gathered = [torch.empty_like(on_device) for _ in range(world_size())]
    dist.all_gather(gathered, on_device)
    return torch.stack(gathered).to(tensor.device)


def any_rank(flag: bool) -> bool:
    """Return True on every rank if the flag is set on at least one."""
    return bool(all_reduce_sum(torch.tensor(float(flag))) > 0)
