"""Evaluation during ZeRO-3 training, with weights sharded over two ranks."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from clex_train.config.engine import EngineConfig
from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.evaluation.methods import tables
from clex_train.evaluation.protocols import readings
from clex_train.evaluation.runner import evaluate
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows
from tests.helpers.ports import free_port


@pytest.mark.slow
def test_sharded_weights_score_like_whole_ones_and_training_is_unaffected(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    torch.multiprocessing.spawn(_rank_main, args=(free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["sharded"] == found["whole"]
        assert found["losses_after_evaluation"] == found["losses_without"]
        assert found["trained"] != found["sharded"]


def _rank_main(rank: int, port: str, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=port, DS_ACCELERATOR="cpu")
    from clex_train.engine.deepspeed import open_process_group

    open_process_group(EngineConfig())
    whole = build_tiny_llama()
    found: dict[str, object] = {"whole": _perplexities(whole, install_rotary(whole, CONTEXT_LEN))}
    engine, _ = _sharded()
    found["losses_without"] = [_train_step(engine) for _ in range(4)]
    engine, handle = _sharded()
    found["sharded"] = _perplexities(engine.module, handle)
    losses = [_train_step(engine) for _ in range(2)]
    found["trained"] = _perplexities(engine.module, handle)
    found["losses_after_evaluation"] = losses + [_train_step(engine) for _ in range(2)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def _perplexities(model, handle) -> dict[str, float]:
    chosen = tables([Method.none, Method.ntk], base_rope(handle), 64)
    protocols = [protocol for protocol in Protocol if protocol not in (Protocol.streaming, Protocol.long_ppl)]
    spec = EvaluationConfig(lengths=[16, 32, 64], protocols=protocols, stride=8)
    return evaluate(model, handle, chosen, random_windows(3, 64), readings(spec, CONTEXT_LEN), chunk_len=20).metrics()


def _sharded():
    import deepspeed

    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, handle


def _train_step(engine) -> float:
    tokens = torch.from_numpy(random_windows(1, 32).tokens)
    engine.train()
    loss = engine(input_ids=tokens, labels=tokens, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    return loss.item()
