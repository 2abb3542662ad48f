"""Loading of the model that a program evaluates, whole or sharded.

`sharded=true` splits the weights over the ranks (ZeRO-3) while they are read. Each layer is gathered as it runs, so
every rank must run the same number of forwards. `offload_parameters=true` keeps the shards in host memory.
"""

import torch

from clex_train.config.engine import EngineConfig, Offload
from clex_train.config.model import ModelConfig
from clex_train.console.loading_keys import LoadingConfig
from clex_train.engine import deepspeed
from clex_train.models.load import LoadedModel, load_for_evaluation
from clex_train.utils import distributed


def precision_of(args: LoadingConfig) -> torch.dtype:
    """Return the dtype that `load` will read the weights in."""
    return deepspeed.precision(EngineConfig(precision=args.precision))


def load(args: LoadingConfig, model: ModelConfig) -> tuple[LoadedModel, torch.dtype]:
    """Load the model onto this rank's device, whole or this rank's shard of it; also return its dtype. Collective."""
    engine = EngineConfig(precision=args.precision, offload=Offload.all if args.offload_parameters else Offload.none)
    if args.sharded or distributed.world_size() > 1:
        deepspeed.open_process_group(engine)
    dtype = deepspeed.precision(engine)
    if args.sharded:
        loaded = load_for_evaluation(model, dtype, args.attention, deepspeed.inference_dict(engine))
        loaded.engine = deepspeed.build_for_inference(loaded.model, engine)
        return loaded, dtype
    loaded = load_for_evaluation(model, dtype, args.attention)
    loaded.model.to(distributed.device())
    return loaded, dtype
