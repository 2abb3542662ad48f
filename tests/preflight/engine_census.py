"""Count the bytes of real engines on two ranks; run by torchrun from test_memory_of_engine.py.

Rank 0 prints one line of JSON for each case: the bytes found and those that `preflight/memory.py` expects.
"""

import gc
import json
import logging
import os
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger
from torch import Tensor, nn

from clex_train.preflight import model_states

WIDTH, NUM_BLOCKS, BUCKET = 256, 12, 100_000
BLOCK = WIDTH * WIDTH


class Chain(nn.Module):
    """A chain of blocks of equal size."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_BLOCKS)])
        self.recomputed = recomputed

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            inside = 0 < index < NUM_BLOCKS - 1
            x = (
                torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
                if self.recomputed and inside
                else block(x)
            )
        return x


def bytes_of_tensors() -> int:
    """Return the bytes of all tensors with data that Python can see, and of their gradients."""
    gc.collect()
    sizes = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and not thing.is_meta:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def build_engine(model: nn.Module, dtype: torch.dtype, zero: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0, **zero},
        "steps_per_print": 2**31,
    }
    model = model.to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
        config=settings,
        dist_init_required=False,
    )
    return engine, settings


def state_between_micro_batches(stage: int, dtype: torch.dtype, num_frozen: int = 0) -> dict[str, Any]:
    """Count all bytes after the first micro batch of the second step, when activations are freed."""
    before = bytes_of_tensors()
    chain = Chain(recomputed=False)
    chain.blocks[:num_frozen].requires_grad_(False)
    engine, settings = build_engine(chain, dtype, {"stage": stage})
    x = torch.randn(2, WIDTH, dtype=dtype)
    for _ in range(3):
        engine.backward(engine(x).float().square().mean())
        engine.step()
    found = bytes_of_tensors() - before
    s = model_states.sharding(settings, dist.get_world_size(), dtype, checkpointing=False, on_gpu=False)
    blocks = (BLOCK,) * NUM_BLOCKS
    count = sum(blocks[num_frozen:])
    # Between two passes no layer is gathered, and a bucket is only copied while it is reduced.
    kept = model_states.parameters(s, blocks).device - (
        s.parameter * model_states.live_parameters(s, blocks) if stage == 3 else 0
    )
    in_flight = s.parameter * BUCKET * (stage >= 2)
    expected = kept + model_states.gradients(s, count).device - in_flight + model_states.optimizer(s, count).device
    case = f"state of stage {stage} in {dtype}, {num_frozen} of {NUM_BLOCKS} blocks frozen"
    return {"case": case, "found": found, "expected": expected}


def whole_blocks(recomputed: bool, distance: float, prefetch: float, max_live: float) -> dict[str, Any]:
    """Return the peak number of gathered ZeRO-3 parameters over three steps; arguments are in blocks."""
    zero = {
        "stage": 3,
        "stage3_max_reuse_distance": int(distance * BLOCK),
        "stage3_prefetch_bucket_size": int(prefetch * BLOCK),
        "stage3_max_live_parameters": int(max_live * BLOCK),
    }
    engine, settings = build_engine(Chain(recomputed), torch.float32, zero)
    parameters, most = list(engine.module.parameters()), [0]

    def count_gathered(*_: Any) -> None:
        whole = sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        most[0] = max(most[0], whole)

    for block in engine.module.blocks:
        block.register_forward_hook(count_gathered)
        block.register_full_backward_hook(count_gathered)
    for _ in range(3):
        engine.backward(engine(torch.randn(2, WIDTH, requires_grad=True)).square().mean())
        engine.step()
    s = model_states.sharding(settings, dist.get_world_size(), torch.float32, checkpointing=recomputed, on_gpu=False)
    case = f"whole blocks: recomputed {recomputed}, distance {distance}, prefetch {prefetch}, limit {max_live}"
    return {"case": case, "found": most[0], "expected": model_states.live_parameters(s, (BLOCK,) * NUM_BLOCKS)}


def main() -> None:
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    cases = [
        state_between_micro_batches(stage, dtype, num_frozen)
        for stage in (1, 2, 3)
        for dtype in (torch.float32, torch.bfloat16)
        for num_frozen in (0, NUM_BLOCKS - 4)
    ]
    for recomputed in (False, True):
        for distance, prefetch, max_live in ((0, 0, 9), (2.5, 0, 9), (6.5, 0, 9), (0, 2, 4), (4.5, 2, 6), (100, 2, 4)):
            cases.append(whole_blocks(recomputed, distance, prefetch, max_live))
    if dist.get_rank() == 0:
        print("\n".join(json.dumps(case) for case in cases), flush=True)


if __name__ == "__main__":
    main()
