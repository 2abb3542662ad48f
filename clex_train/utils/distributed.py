"""Ranks, devices and the few collectives that the rest of the package uses; works unchanged in a single process.

The process group itself is opened by the engine (DeepSpeed); without one, every function is the identity of one rank.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import psutil
import torch
import torch.distributed as dist

from clex_train.utils import ranks
from clex_train.utils.bounds import require
from clex_train.utils.errors import RunStopped, first_line

MAKE_ROOM = "what was saved is intact: make room and run the same command again"


def is_initialized() -> bool:
    """Tell whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Global rank; before the group is open, what the launcher put into the environment."""
    return dist.get_rank() if is_initialized() else ranks.rank_and_world_size()[0]


def world_size() -> int:
    """Return the number of ranks; before the group is open, what the launcher put into the environment."""
    return dist.get_world_size() if is_initialized() else ranks.rank_and_world_size()[1]


def is_main() -> bool:
    """True on the one rank that prints and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this rank: its CUDA device if there is one, else the CPU.

    Where a task is bound to one GPU (`srun --gpus-per-task=1`) that is cuda:0, whatever its number among the tasks.
    `ValueError` for more ranks than visible devices, on each of them: NCCL refuses two on one GPU in words of its own.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, visible = ranks.read_int("LOCAL_RANK", 0), torch.cuda.device_count()
    together = max(ranks.read_int(name, 1, least=1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    is_bound = visible == 1 and (together == 1 or _has_gpu_of_its_own(os.environ.get("CUDA_VISIBLE_DEVICES", "")))
    require(
        is_bound or max(local + 1, together) <= visible,
        "LOCAL_RANK",
        local,
        f"{max(local + 1, together)} ranks on this machine, and {visible} visible GPU{'' if visible == 1 else 's'}; "
        "start as many ranks as GPUs, such as torchrun --nproc-per-node=gpu",
    )
    return torch.device("cuda", 0 if is_bound else local)


@cache
def _has_gpu_of_its_own(devices: str) -> bool:
    """Tell whether a wrapper has bound this rank to one GPU, `devices`: the launcher then sees others, or all.

    Otherwise ranks of torchrun and of DeepSpeed's launcher see the same, what a user has exported included.
    """
    if not devices or "," in devices:
        return False
    try:
        environments = (process.environ() for process in psutil.Process().parents())
        of_launcher = next(variables for variables in environments if "LOCAL_RANK" not in variables)
    except (psutil.Error, StopIteration):
        return True
    return of_launcher.get("CUDA_VISIBLE_DEVICES") != devices


def to_device(tensor: torch.Tensor, target: torch.device | None = None) -> torch.Tensor:
    """Copy a tensor to this rank's device, or `target`, without waiting as a copy from pageable memory does."""
    target = target or device()
    if tensor.device.type == "cpu" and target.type == "cuda":
        return tensor.pin_memory().to(target, non_blocking=True)
    return tensor.to(target)


def barrier() -> None:
    """Wait until every rank is here."""
    if is_initialized() and world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks; the result has the device and dtype of `tensor`, which is left alone."""
    if world_size() == 1:
        return tensor.clone()
    on_device = tensor.to(device(), copy=True)
    dist.all_reduce(on_device)
    return on_device.to(tensor.device)


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean over ranks; bitwise the same on every rank."""
    return all_reduce_sum(tensor) / world_size()


def all_reduce_sum_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to bring the sum over ranks of a tensor on the device to the host; what is returned waits for it.

    What the device is given to do after this call is not waited for.
    """
    total = all_reduce_sum(tensor)
    if total.device.type == "cpu":
        return lambda: total
    host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
    host.copy_(total, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> torch.Tensor:
        arrived.synchronize()
        return host

    return wait


def broadcast_to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's value on the device of every rank; the host does not wait for it."""
    on_device = to_device(tensor.clone())
    if world_size() > 1:
        dist.broadcast(on_device, src=0)
    return on_device


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's value on every rank; shape and dtype must agree beforehand."""
    if world_size() == 1:
        return tensor.clone()
    on_device = tensor.to(device(), copy=True)
    dist.broadcast(on_device, src=0)
    return on_device.to(tensor.device)


def broadcast_object(value: Any) -> Any:
    """Rank 0's small picklable object on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def try_on_main(write: Callable[[], object]) -> OSError | None:
    """Have rank 0 write files; every rank learns the error that kept it from that, or None. Collective."""
    failure = None
    if is_main():
        try:
            write()
        except OSError as error:
            failure = error
    return broadcast_object(failure) if is_initialized() else failure


def write_on_main(write: Callable[[], object]) -> None:
    """Have rank 0 write files; `RunStopped` on every rank when it cannot, as on a full disk. Collective."""
    if (failure := try_on_main(write)) is not None:
        raise RunStopped(f"{describe_write_error(failure)}; {MAKE_ROOM}") from failure


def describe_write_error(error: OSError) -> str:
    """Name the file that an error is about, and why it could not be written."""
    return f"{error.filename or 'a file of the run'}: cannot be written ({error.strerror or first_line(error)})"


def gather_objects(value: Any) -> list[Any]:
    """Gather the small picklable objects of all ranks, in their order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Gather equally shaped tensors of all ranks, stacked in their order [ranks, ...], on every rank."""
    if world_size() == 1:
        return tensor[None].clone()
    on_device = tensor.to(device())
    gathered = [torch.empty_like(on_device) for _ in range(world_size())]
    dist.all_gather(gathered, on_device)
    return torch.stack(gathered).to(tensor.device)


def any_rank(flag: bool) -> bool:
    """Tell whether the flag is set on at least one rank; every rank gets the same answer."""
    return bool(all_reduce_sum(torch.tensor(float(flag))) > 0)
