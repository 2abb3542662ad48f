"""All-reduce of what the ranks share once in an optimizer step, in one collective and one copy to the host.

    [sum of losses | number of stop requests | gradient of the frequencies | row indices, each rank in its place]

It begins before the weights are updated, so that the host reads it while the device is busy with the update. All in
float64: integers below 2^53 are exact in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clex_train.utils import distributed


@dataclass(frozen=True)
class StepReduction:
    """Values of a step that are the same on every rank."""

    loss: float
    """Mean over micro-batches and ranks."""
    stop_requested: bool
    """True if any rank has a stop request."""
    gradient: Tensor
    """Mean over ranks of their gradients, float64 [P] on the host."""
    rows: Tensor
    """Indices of all rows of the step, int64, rank after rank."""


def all_reduce_step(
    losses: Sequence[Tensor], stop_requested: bool, rows: Tensor, gradient: Tensor
) -> Callable[[], StepReduction]:
    """Begin the all-reduce of a step; the function that is returned waits for it. Collective.

    Args:
        losses: of the micro-batches, scalars on the device.
        stop_requested: this rank has a stop request.
        rows: indices of this rank's rows, int64 on the host, equally many on every rank.
        gradient: float64 [P] on the device; P = 0 without one.
    """
    ranks, first = distributed.world_size(), distributed.rank() * len(rows)
    known = torch.zeros(1 + ranks * len(rows), dtype=torch.float64)
    known[0] = float(stop_requested)
    # Each rank fills its own places, so the sum over ranks is a gather.
    known[1 + first : 1 + first + len(rows)] = rows.double()
    loss = torch.stack(list(losses)).double().mean().reshape(1)
    averaged = torch.cat((loss, gradient))
    wait_for_sum = distributed.all_reduce_sum_to_host(torch.cat((averaged, distributed.to_device(known))))

    def wait() -> StepReduction:
        total = wait_for_sum()
        means, counts = total[: len(averaged)] / ranks, total[len(averaged) :]
        return StepReduction(float(means[0]), float(counts[0]) > 0, means[1:], counts[1:].long())

    return wait
