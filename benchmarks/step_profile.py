"""Profile a training step with torch.profiler: attention, MLP, loss, optimizer, communication, the ODE.

Modules and calls are marked by ranges while the profiler runs. An operation belongs to the innermost range around it;
an operation of the backward pass belongs to the range of its forward operation, by the sequence number that both have.
Times exclude nested operations: kernel time on a GPU, else CPU time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

ATTENTION, MLP, LOSS, OPTIMIZER, COMMUNICATION, ODE, OTHER = (
    "attention", "MLP", "loss", "optimizer", "communication", "ODE", "other"
)  # fmt: skip
MARK = "step part: "
MODULES = {"self_attn": ATTENTION, "attn": ATTENTION, "attention": ATTENTION, "mlp": MLP, "block_sparse_moe": MLP}
OPERATIONS = {
    COMMUNICATION: ("c10d::", "nccl:", "gloo:", "record_param_comms"),
    LOSS: ("cross_entropy", "nll_loss", "log_softmax"),
}
BACKWARD = "autograd::engine::evaluate_function"


def profiled(parts: Any, step: Callable[[], float]) -> list[str]:
    """Format a table of one step of `training.state.Parts`, taken by `step`, which returns its seconds."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    calls = [(parts.engine, "step", OPTIMIZER), *((parts.ode, name, ODE) for name in ("begin", "finish", "prefetch"))]
    with marked(parts.loaded.model, calls), profile(activities=activities) as recorded:
        seconds = step()
    spent = shares(recorded.events(), on_gpu)
    total = sum(spent.values())
    where = "kernels of the GPU" if on_gpu else "operations on the CPU"
    rows = [f"| {name} | {spent[name] / 1e3:,.1f} | {100 * spent[name] / total:.1f} % |" for name in (
        ATTENTION, MLP, LOSS, OPTIMIZER, COMMUNICATION, ODE, OTHER)]  # fmt: skip
    return [
        "",
        f"One step under the profiler, {1e3 * seconds:,.1f} ms by the clock; {where}, forward and backward together.",
        "`other`: norms, residuals, embedding, cos and sin, and what the host does between operations is in none.",
        "",
        "| | ms | share |",
        "|---|--:|--:|",
        *rows,
    ]


def shares(events: Any, on_gpu: bool) -> dict[str, float]:
    """Return the microseconds of each part."""
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    forward, spent = forward_parts(host), defaultdict(float)
    for event in host:
        spent[part_of(event, forward)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return spent


def forward_parts(host: list[Any]) -> dict[int, str]:
    """Map each node of the graph, by its number, to a part."""
    found: dict[int, str] = {}
    for event in sorted(host, key=lambda event: event.time_range.start):
        # Among operations with the same number, the one started last made the node.
        if event.sequence_nr >= 0 and not _is_backward(event):
            found[event.sequence_nr] = part_of(event, {})
    return found


def part_of(event: Any, forward: dict[int, str]) -> str:
    """Find the part of an event: its innermost range, an operation of a known part, or a node of the backward pass."""
    while event is not None:
        if event.name.startswith(MARK):
            return str(event.name.removeprefix(MARK))
        for part, names in OPERATIONS.items():
            if any(name in event.name for name in names):
                return part
        if event.name.startswith(BACKWARD) and event.sequence_nr in forward:
            return forward[event.sequence_nr]
        event = event.cpu_parent
    return OTHER


@contextmanager
def marked(model: nn.Module, calls: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Open profiler ranges around a model's modules and around methods of objects, given as (object, name, part)."""
    handles = []
    for module, part in _modules(model):
        ranges: list[Any] = []
        handles += [
            module.register_forward_pre_hook(lambda *_, ranges=ranges, part=part: _enter(ranges, part)),
            module.register_forward_hook(lambda *_, ranges=ranges: ranges.pop().__exit__(None, None, None)),
        ]
    for owner, name, part in calls:
        setattr(owner, name, _ranged(getattr(owner, name), part))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for owner, name, _ in calls:
            delattr(owner, name)


def _modules(model: Any) -> Iterator[tuple[nn.Module, str]]:
    for name, module in model.named_modules():
        part = MODULES.get(name.rpartition(".")[2])
        if part is not None:
            yield module, part
    yield model.get_output_embeddings(), LOSS


def _enter(ranges: list[Any], part: str) -> None:
    ranges.append(record_function(MARK + part))
    ranges[-1].__enter__()


def _ranged(call: Callable[..., Any], part: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + part):
            return call(*args, **kwargs)

    return run


def _is_backward(event: Any) -> bool:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False
