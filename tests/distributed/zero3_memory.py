"""Train small models with each memory option, under ZeRO-3 on the ranks that torchrun starts.

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/zero3_memory.py FOLDER

Every weight is sharded and gathered like those of a large model. Rank 0 writes FOLDER/figures.json: by family and
options the losses of three steps, the largest `distance` of a weight from that of the plain run, and the number of
elements that the last step gathered.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deepspeed.runtime.zero import partition_parameters  # noqa: E402

from clex_train.config.engine import Offload  # noqa: E402
from clex_train.config.root import Config  # noqa: E402
from clex_train.data.batch import UNSCORED, MicroBatch  # noqa: E402
from clex_train.engine import deepspeed as engines  # noqa: E402
from clex_train.models import architecture, load, memory_options  # noqa: E402
from clex_train.training import loop  # noqa: E402
from clex_train.training.ode_optimizer import OdeOptimizer  # noqa: E402
from clex_train.training.state import Parts  # noqa: E402
from clex_train.utils import distributed  # noqa: E402
from tests.distributed.zero3_families import LENGTH, ROWS, STEPS, batch, configuration, save  # noqa: E402

NOTHING_KEPT = {
    f"stage3_{size}": 0
    for size in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
}
FETCHED_AHEAD = {"stage3_param_persistence_threshold": 0}
"""The treatment of large weights by default in DeepSpeed."""
ALL = {"tiled_loss": 5, "tiled_mlp": 7, "activation_checkpointing": True, "offload_activations": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled_loss": {"tiled_loss": 5},
    "tiled_mlp": {"tiled_mlp": 7},
    "all": ALL,
    "all_fetched_ahead": {**ALL, "zero": FETCHED_AHEAD},
    "recomputed": {"activation_checkpointing": True},
    "optimizer": {"offload": Offload.optimizer},
    "optimizer_and_parameters": {"offload": Offload.all},
}
FAMILIES = ("qwen3", "gpt_neox")
"""Qwen3 has a tied output layer, gated MLPs and no biases; GPT-NeoX the opposite, and an MLP parallel to attention."""

gathered: list[int] = []
zero = dict(NOTHING_KEPT)


def main(folder: Path) -> None:
    """Train every family with every option."""
    torch.set_num_threads(1)
    engines.open_process_group(Config().engine)
    patch_deepspeed()
    figures = {}
    for family in FAMILIES:
        directory = folder / family
        if distributed.is_main():
            save(family, directory)
        distributed.barrier()
        plain: dict[str, torch.Tensor] = {}
        for name, options in OPTIONS.items():
            figures[f"{family}/{name}"], weights = train(directory, options)
            plain = plain or weights
            figures[f"{family}/{name}"]["distance"] = farthest(weights, plain)
            gc.collect()
    if distributed.is_main():
        (folder / "figures.json").write_text(json.dumps(figures))


def patch_deepspeed() -> None:
    """Add `zero` to the settings of ZeRO-3, and count what it gathers."""
    made, gather = engines.deepspeed_dict, partition_parameters._dist_allgather_fn

    def changed(config: Config, world_size: int) -> dict[str, Any]:
        settings = made(config, world_size)
        settings["zero_optimization"] |= zero
        return settings

    def counted(input_tensor: torch.Tensor, output_tensor: torch.Tensor, group: Any = None) -> Any:
        gathered.append(output_tensor.numel())
        return gather(input_tensor, output_tensor, group)

    engines.deepspeed_dict = changed
    partition_parameters._dist_allgather_fn = counted


def train(directory: Path, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Take three optimizer steps of two unequal micro batches on each rank; return the weights on rank 0."""
    config = configuration(directory, stage=3, act="silu")
    # With a smaller eps, AdamW would amplify rounding in gradients that are 0, such as that of a key's bias.
    config.optim.eps = 1e-4
    config.engine.micro_batch = ROWS // distributed.world_size() // 2
    zero.clear()
    zero.update(options.get("zero", NOTHING_KEPT))
    for key, value in options.items():
        if key != "zero":
            setattr(config.engine, key, value)
    arch = architecture.to_train(config.model)
    memory_options.check(config.engine, arch)
    settings = engines.deepspeed_dict(config, distributed.world_size())
    loaded = load.load_for_training(config, arch, torch.float32, settings)
    assert loaded.clex is not None
    memory_options.install(loaded.model, config.engine)
    engine = engines.build(loaded.model, config)
    nothing: Any = None
    ode = OdeOptimizer(loaded.clex, config.scaling, config.seed)
    parts = Parts(config, engine, loaded, rows=nothing, ode=ode, checkpoints=nothing, evaluate=None)
    losses, before = [], engines.consolidated_state_dict(engine)
    for step in range(STEPS):
        gathered.clear()
        losses.append(loop.train_step(parts, step, iter(micro_batches(step, arch.vocab_size)))["loss"])
    figures = {"losses": losses, "gathered": sum(gathered), "gathers": len(gathered)}
    weights = engines.consolidated_state_dict(engine)
    figures["moved"] = farthest(before, weights)
    engine.destroy()
    return figures, weights


def farthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of an element; 0 on ranks without weights."""
    return max((float((one[key] - other[key]).abs().max()) for key in one), default=0.0)


def micro_batches(step: int, vocab_size: int) -> list[MicroBatch]:
    """Return this rank's rows one by one; the second scores a third of its tokens, and none on rank 1."""
    rows = batch(step, vocab_size)
    rows.targets[1, 0 if distributed.rank() else LENGTH // 3 - 1 :] = UNSCORED
    one_by_one = (slice(index, index + 1) for index in range(len(rows.targets)))
    return [MicroBatch(rows.token_ids[i], rows.targets[i], None, rows.row_indices[i]) for i in one_by_one]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
