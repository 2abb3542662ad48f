"""Loss and gradients of one sequence-parallel step of two ranks under ZeRO-3.

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/sharing_ranks.py FOLDER CASE...

FOLDER/<CASE> has the weights. Rank 0 writes FOLDER/<CASE>.safetensors: the loss of the step, the gradient of every
weight, of the frequencies and of the ODE, and the loss of the same model for an unsharded row outside of training.
`step_of_one_process` is the reference: one process, no engine, whole rows.
"""

import json
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from clex_train.config.attention import AttentionConfig  # noqa: E402
from clex_train.config.engine import EngineConfig  # noqa: E402
from clex_train.config.method import Method  # noqa: E402
from clex_train.config.model import ModelConfig  # noqa: E402
from clex_train.config.root import Config  # noqa: E402
from clex_train.config.scaling import LogScale, Positions, ScalingConfig  # noqa: E402
from clex_train.data import step_batches  # noqa: E402
from clex_train.data.batch import UNSCORED, collate_documents, collate_rows  # noqa: E402
from clex_train.data.rows import PADDING, Row  # noqa: E402
from clex_train.engine import deepspeed as engines  # noqa: E402
from clex_train.engine import sequence_parallel  # noqa: E402
from clex_train.models import architecture, load, memory_options  # noqa: E402
from clex_train.preflight import meta_model  # noqa: E402
from clex_train.preflight.activations import measure  # noqa: E402
from clex_train.training import loop  # noqa: E402
from clex_train.training.ode_optimizer import FixedFrequencies, OdeOptimizer  # noqa: E402
from clex_train.training.state import Parts  # noqa: E402
from clex_train.utils import distributed  # noqa: E402

SEQ_LEN, VOCABULARY = 33, 61
PASSES = 12
CLEX: dict[str, Any] = {"name": Method.clex, "t_max": 4.0, "lr_scale": 1.0}
LAYOUTS = {
    "one": [([33], 0)] * 4,
    "several": [([5, 1, 16, 11], 0), ([10, 3], 20)],
}
"""Documents and padding of the rows of a step. The second half of the last row, one rank's shard, is all padding."""
CASES: dict[str, dict[str, Any]] = {
    "clex": {
        "rows": "one",
        "key_heads": 1,
        "context_len": 16,
        "scaling": {**CLEX, "positions": Positions.mix, "log_scale": LogScale.always},
    },
    "documents": {
        "rows": "several",
        "key_heads": 2,
        # Below the longest document, so that some queries on either rank have factors above 1.
        "context_len": 8,
        "scaling": {**CLEX, "positions": Positions.skip, "log_scale": LogScale.token},
    },
    "lambda": {
        "rows": "one",
        "key_heads": 2,
        "context_len": 64,
        "scaling": {**CLEX, "positions": Positions.plain, "log_scale": LogScale.official},
        "attention": AttentionConfig(lambda_mask=True, n_local=6, n_global=2),
    },
    "plain": {
        "rows": "one",
        "family": "gpt_neox",
        "key_heads": 4,
        "context_len": 16,
        "scaling": {"name": Method.none, "log_scale": LogScale.always},
    },
}
"""Cases of two micro batches. `documents` recomputes layers and tiles the loss and the MLPs."""


class GivenRows:
    """Repeat the rows of a case, with other tokens for each row."""

    seq_len = SEQ_LEN

    def __init__(self, layout: list[tuple[list[int], int]]) -> None:
        self.layout = layout

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, index: int) -> Row:
        lengths, padding = self.layout[index % len(self)]
        segments = np.repeat([*range(len(lengths)), PADDING], [*lengths, padding]).astype(np.int32)
        # Rows of several documents are conversations, of which the loss counts a part.
        scored = np.random.default_rng(index).random(SEQ_LEN) < 0.4 if len(lengths) > 1 else None
        return Row(np.random.default_rng(index).integers(3, VOCABULARY, SEQ_LEN), segments, index, scored)


def save_model(folder: Path, case: str) -> None:
    """Save a seeded random model with weights large enough for every layer to matter."""
    torch.manual_seed(0)
    arch = AutoConfig.for_model(
        CASES[case].get("family", "llama"),
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=CASES[case]["key_heads"],
        max_position_embeddings=CASES[case]["context_len"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(arch)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / case)


def configuration(folder: Path, case: str, ranks: int) -> Config:
    """Configure one step of accumulation 2 with sequences sharded over `ranks` ranks."""
    given = CASES[case]
    config = Config(model=ModelConfig(path=str(folder / case)), scaling=ScalingConfig(**given["scaling"]))
    config.attention = given.get("attention", config.attention)
    config.data.seq_len, config.data.document_mask = SEQ_LEN, given["rows"] == "several"
    config.engine.zero_stage = 3 if ranks > 1 else 0
    if case == "documents" and ranks > 1:
        config.engine.activation_checkpointing, config.engine.tiled_loss, config.engine.tiled_mlp = True, 8, 5
    config.engine.sequence_parallel, config.engine.accumulation = ranks, 2
    config.optim.batch_rows = len(LAYOUTS[given["rows"]])
    config.engine.micro_batch = config.optim.batch_rows // 2
    return config


def parts_of(folder: Path, case: str, ranks: int) -> Parts:
    """Build the parts as train.py does; for one process without an engine."""
    config = configuration(folder, case, ranks)
    settings = engines.deepspeed_dict(config, ranks)
    loaded = load.load_for_training(config, architecture.to_train(config.model), torch.float32, settings)
    loaded.model.train()
    memory_options.install(loaded.model, config.engine)
    if loaded.clex:
        # The initial field of zeros would pass no gradient to its lower layer.
        generator = torch.Generator().manual_seed(1)
        for parameter in loaded.clex.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    engine = engines.build(loaded.model, config) if ranks > 1 else None
    unused: Any = None
    return Parts(
        config=config,
        engine=engine,
        loaded=loaded,
        rows=GivenRows(LAYOUTS[CASES[case]["rows"]]),  # type: ignore[arg-type]
        ode=OdeOptimizer(loaded.clex, config.scaling, config.seed) if loaded.clex else FixedFrequencies(),
        checkpoints=unused,
        evaluate=None,
        sequence=sequence_parallel.build(loaded.model, config, config.engine.micro_batch or 1),
    )


def step_of_ranks(folder: Path, case: str) -> dict[str, Tensor]:
    """Take the step on the ranks of this process group."""
    from deepspeed.utils import safe_get_full_grad

    parts = parts_of(folder, case, distributed.world_size())
    held = list(next(loop.read_micro_batches(parts, 0)))
    spectrum = parts.ode.begin(0)
    losses = []
    for index, (batch, weight) in enumerate(zip(held, step_batches.loss_weights(held, 0), strict=True)):
        losses.append(loop.forward_backward(parts, batch, spectrum, weight))
        if index + 1 < len(held):
            parts.engine.step()
    found = {f"weight/{name}": safe_get_full_grad(p) for name, p in parts.loaded.model.named_parameters()}
    found["loss"] = distributed.all_reduce_mean(torch.stack(losses).mean())
    return {**found, **ode_gradients(parts), "whole_row": loss_of_unsharded_row(parts)}


def step_of_one_process(folder: Path, case: str) -> dict[str, Tensor]:
    """Take the step on one process, without DeepSpeed, from whole rows."""
    parts = parts_of(folder, case, 1)
    config, loaded = parts.config, parts.loaded
    collate = collate_documents if config.data.document_mask else collate_rows
    size = config.engine.micro_batch or 1
    held = [collate([parts.rows[row] for row in range(first, first + size)]) for first in (0, size)]
    spectrum = parts.ode.begin(0)
    total = torch.zeros(())
    for batch, weight in zip(held, step_batches.loss_weights(held, 0), strict=True):
        with parts.forward_pass.conditions(batch, spectrum):
            inputs = parts.forward_pass.layout.inputs(batch)
            # The loss of transformers shifts labels itself.
            labels = torch.nn.functional.pad(batch.targets[:, :-1], (1, 0), value=UNSCORED)
            loss = weight * loaded.model(use_cache=False, labels=labels, **inputs).loss / len(held)
            loss.backward()
        total += loss.detach()
    found = {f"weight/{name}": p.grad for name, p in loaded.model.named_parameters()}
    return {**found, "loss": total, **ode_gradients(parts), "whole_row": loss_of_unsharded_row(parts)}


def ode_gradients(parts: Parts) -> dict[str, Tensor]:
    """Return gradients of the frequencies, averaged over ranks, and of the field's weights before clipping."""
    if isinstance(parts.ode, FixedFrequencies):
        return {}
    parts.ode.config.clip = 1e9
    assert parts.ode._leaf is not None
    leaf = distributed.all_reduce_mean(parts.ode._leaf.grad)  # type: ignore[arg-type]
    parts.ode.finish(0.0, apply=False)
    return {"leaf": leaf, **{f"ode/{name}": p.grad for name, p in parts.ode.clex.named_parameters()}}  # type: ignore[misc]


def loss_of_unsharded_row(parts: Parts) -> Tensor:
    """Return the loss of a row that is not sharded, as in an evaluation during training."""
    ids = torch.from_numpy(parts.rows[7].tokens)[None]
    with torch.no_grad():
        return parts.loaded.model(input_ids=ids, labels=ids, use_cache=False).loss


def memory() -> dict[str, Any]:
    """Return measured and expected bytes of a sequence-parallel forward and backward pass.

    Gloo's worker threads release a tensor shortly after its all-to-all, on a busy machine only after the next one.
    About every tenth pass therefore counts one tensor too many, so take the least of several passes.
    """
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    arch = AutoConfig.for_model("llama", **sizes, num_attention_heads=8, num_key_value_heads=1)
    engine = EngineConfig(sequence_parallel=2, activation_checkpointing=True)
    model = AutoModelForCausalLM.from_config(arch, attn_implementation="sdpa").train()
    memory_options.recompute_layers(model)
    sequence = sequence_parallel.SequenceParallel(model, 2, 2, timedelta(minutes=5))
    with sequence.attention(None):
        passes = [measure(model, torch.randint(0, 512, (2, 128))) for _ in range(PASSES)]
    counted = min(passes, key=lambda found: (found.activations, found.logits, found.layers))
    sizes = {"rows": 2, "tokens": 128, "dtype": torch.float32, "attention": "sdpa", "engine": engine}
    expected = meta_model.footprint(arch, **sizes, learns_frequencies=False)
    return {"counted": asdict(counted), "expected": asdict(expected)}


def main(folder: Path, cases: list[str]) -> None:
    """Run each case, and write FOLDER/memory.json."""
    torch.set_num_threads(1)
    engines.open_process_group(Config().engine)
    found = memory()
    if distributed.is_main():
        (folder / "memory.json").write_text(json.dumps(found))
    for case in cases:
        found = step_of_ranks(folder, case)
        if distributed.is_main():
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{case}.safetensors")
        distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
