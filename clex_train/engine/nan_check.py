"""Find weights that are not finite, also where ZeRO-3 shards them."""

import torch
from torch import Tensor, nn

from clex_train.utils import distributed


def non_finite_parameter(model: nn.Module) -> str | None:
    """Return the name of the first parameter that is not finite on any rank, or None. Collective."""
    own = (name for name, parameter in model.named_parameters() if not _is_finite(parameter))
    return next(filter(None, distributed.gather_objects(next(own, None))), None)


def _is_finite(parameter: Tensor) -> bool:
    # Under ZeRO-3 a parameter is empty between gathers; `ds_tensor` is this rank's shard of it.
    own: Tensor = getattr(parameter, "ds_tensor", parameter).detach()
    # `isfinite` allocates a mask as large as the weight. The sum needs no memory, and is finite if all numbers are,
    # except when it overflows.
    return bool(own.sum(dtype=torch.float32).isfinite()) or bool(own.isfinite().all())
