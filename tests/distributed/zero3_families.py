"""Train a small random model of each experiment's family with CLEX, replicated and under ZeRO-3; run by torchrun.

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/zero3_families.py FOLDER [GOLDENS]

Weights are saved first and read into shards as in a run. Rank 0 writes FOLDER/figures.json: by family and ZeRO stage
the losses and the ODE gradient norms of three optimizer steps, and the names of weights that did not change.
"""

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from clex_train.config.attention import AttentionConfig  # noqa: E402
from clex_train.config.method import Method  # noqa: E402
from clex_train.config.model import ModelConfig  # noqa: E402
from clex_train.config.root import Config  # noqa: E402
from clex_train.config.scaling import Activation, Positions, ScalingConfig  # noqa: E402
from clex_train.data.batch import UNSCORED, MicroBatch  # noqa: E402
from clex_train.engine import deepspeed as engines  # noqa: E402
from clex_train.models import architecture, load  # noqa: E402
from clex_train.training import loop  # noqa: E402
from clex_train.training.ode_optimizer import OdeOptimizer  # noqa: E402
from clex_train.training.state import Parts  # noqa: E402
from clex_train.utils import distributed  # noqa: E402

STEPS, ROWS, LENGTH, VOCABULARY = 3, 4, 32, 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LENGTH // 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3": {"model_type": "llama", "num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": None},
    "mixtral": {"num_key_value_heads": 2, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "lambda": {"model_type": "llama", "num_key_value_heads": 2},
}
"""`lambda` is a Llama under LM-Infinite's mask."""


def main(folder: Path, goldens: Path | None) -> None:
    """Train every family at both stages."""
    torch.set_num_threads(1)
    engines.open_process_group(Config().engine)
    figures = {}
    for family in [*FAMILIES, *(["official"] if goldens else [])]:
        directory = folder / family
        if distributed.is_main():
            save_official(directory, goldens) if family == "official" else save(family, directory)
        distributed.barrier()
        for stage in (0, 3):
            figures[f"{family}/{stage}"] = train(directory, stage, act="tanh" if family == "official" else "silu")
            gc.collect()
    if distributed.is_main():
        (folder / "figures.json").write_text(json.dumps(figures))


def save(family: str, directory: Path) -> None:
    """Save a seeded random model with weights large enough for every layer to matter."""
    settings = {"model_type": family, **COMMON, **FAMILIES[family]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)


def save_official(directory: Path, goldens: Path | None) -> None:
    """Save the Llama of the goldens in the layout of the original CLEX code."""
    assert goldens is not None
    directory.mkdir(parents=True)
    shutil.copyfile(goldens / "clex_llama.config.json", directory / "config.json")
    shutil.copyfile(goldens / "clex_llama.weights.safetensors", directory / "model.safetensors")


def train(directory: Path, stage: int, act: str) -> dict[str, Any]:
    """Take three optimizer steps as train.py does."""
    config = configuration(directory, stage, act)
    settings = engines.deepspeed_dict(config, distributed.world_size())
    arch = architecture.to_train(config.model)
    loaded = load.load_for_training(config, arch, torch.float32, settings)
    assert loaded.clex is not None
    assert all(hasattr(p, "ds_id") == (stage == 3) for p in loaded.model.parameters()), "sharded while reading"
    engine = engines.build(loaded.model, config)
    parts: Any = Parts(
        config=config,
        engine=engine,
        loaded=loaded,
        rows=None,  # type: ignore[arg-type]
        ode=OdeOptimizer(loaded.clex, config.scaling, config.seed),
        checkpoints=None,  # type: ignore[arg-type]
        evaluate=None,
    )
    before = engines.consolidated_state_dict(engine)
    steps = [loop.train_step(parts, step, iter([batch(step, arch.vocab_size)])) for step in range(STEPS)]
    after = engines.consolidated_state_dict(engine)
    return {
        "losses": [figures["loss"] for figures in steps],
        "ode_grad_norms": [figures["ode_grad_norm"] for figures in steps],
        "untouched": [name for name in before if torch.equal(before[name], after[name])],
        "experts": [name for name in before if "experts" in name],
    }


def configuration(directory: Path, stage: int, act: str) -> Config:
    """Configure CLEX with a field that learns as fast as the model."""
    scaling = ScalingConfig(name=Method.clex, t_max=16.0, act=Activation(act), lr_scale=1.0)
    config = Config(model=ModelConfig(path=str(directory)), scaling=scaling)
    if directory.name == "lambda":
        scaling.positions = Positions.plain
        config.attention = AttentionConfig(lambda_mask=True, n_local=8, n_global=2)
    config.data.seq_len = LENGTH
    config.engine.zero_stage = stage
    config.engine.micro_batch = ROWS // distributed.world_size()
    config.optim.batch_rows, config.optim.steps, config.optim.lr, config.optim.warmup = ROWS, STEPS, 1e-3, 0.0
    return config


def batch(step: int, vocab_size: int) -> MicroBatch:
    """Return this rank's rows of a step; the global rows do not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, vocab_size, (ROWS, LENGTH), generator=generator)
    index = torch.arange(step * ROWS, (step + 1) * ROWS)
    mine = slice(distributed.rank(), None, distributed.world_size())
    targets = torch.nn.functional.pad(ids[mine, 1:], (0, 1), value=UNSCORED)
    return MicroBatch(ids[mine], targets, None, index[mine])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
