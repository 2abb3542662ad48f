"""What the ranks tell each other once in an optimizer step, in one collective and one copy to the host.

    [sum of losses | ranks that were asked to stop | gradient of the frequencies | row indices, each rank in its place]

It leaves before the weights are updated, so that the host reads it while the device is busy with the update. All in
float64: integers below 2^53 are exact in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clex_train.utils import distributed


@dataclass(frozen=True)
class Told:
    """The same on every rank."""

    loss: float
    """Mean over micro-batches and ranks."""
    asked_to_stop: bool
    """Whether a rank was."""
    gradient: Tensor
    """Mean over ranks of the gradient that was handed in, float64 on the host."""
    rows: Tensor
    """Indices of all rows of the step, int64, rank after rank."""


def exchange(
    losses: Sequence[Tensor], asked_to_stop: bool, rows: Tensor, gradient: Tensor | None = None
) -> Callable[[], Told]:
    """Send this rank's part; what is returned waits for the sum. Collective.

    Args:
        losses: of the micro-batches, scalars on the device.
        asked_to_stop: whether this rank was.
        rows: indices of this rank's rows, int64 on the host, as many on every rank.
        gradient: float64 [P] on the device; None for none, P = 0.
    """
    ranks, first = distributed.world_size(), distributed.rank() * len(rows)
    known = torch.zeros(1 + ranks * len(rows), dtype=torch.float64)
    known[0] = float(asked_to_stop)
    known[1 + first : 1 + first + len(rows)] = rows.double()
    loss = torch.stack(list(losses)).double().mean().reshape(1)
    averaged = loss if gradient is None else torch.cat((loss, gradient))
    wait = distributed.all_reduce_sum_to_host(torch.cat((averaged, distributed.to_device(known))))

    def read() -> Told:
        total = wait()
        means, counts = total[: len(averaged)] / ranks, total[len(averaged) :]
        return Told(float(means[0]), float(counts[0]) > 0, means[1:], counts[1:].long())

    return read
