"""The evaluation runner: methods x protocols x lengths over one set of windows, on one and two ranks."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from clex_train.config.evaluation import EvaluationConfig, Protocol
from clex_train.config.method import Method
from clex_train.evaluation.grid import jobs
from clex_train.evaluation.methods import tables
from clex_train.evaluation.protocols import readings
from clex_train.evaluation.results import Results
from clex_train.evaluation.runner import evaluate, rank_batches
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import install_rotary
from clex_train.utils import progress
from tests.evaluation import plain_llama
from tests.evaluation.evaluation_models import CONTEXT_LEN, build_tiny_llama, random_windows
from tests.helpers.warm_processes import call_on_two_ranks

LENGTHS = [16, 32, 64]
CPU = torch.device("cpu")
PROTOCOLS = [protocol for protocol in Protocol if protocol not in (Protocol.streaming, Protocol.long_ppl)]
READINGS = readings(EvaluationConfig(lengths=LENGTHS, protocols=PROTOCOLS, stride=8), CONTEXT_LEN)
NAMES = [protocol.value for protocol in PROTOCOLS]


def run(
    num_windows: int = 3, methods: tuple[Method, ...] = (Method.none, Method.ntk), model=None, **settings
) -> Results:
    model = model or build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    windows = random_windows(num_windows, max(LENGTHS))
    chosen = tables(methods, base_rope(handle), max(LENGTHS))
    return evaluate(model, handle, chosen, windows, READINGS, device=CPU, **{"chunk_len": 20, **settings})


def test_every_cell_equals_the_naive_average_over_the_same_tokens() -> None:
    results = run()
    model, windows = build_tiny_llama(), random_windows(3, 64)
    base = 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    for length in LENGTHS:
        t = length / 16
        ntk = base * (2 * t - 1) ** -(torch.arange(4, dtype=torch.float64) / 3)
        total, count = 0.0, 0
        for window in windows.tokens:
            for start in range(0, 64, length):
                piece = window[start : start + length].tolist()
                nll = plain_llama.chunk_nll(model.state_dict(), model.config, piece, [(0, length, ntk)])
                for i in range(length):
                    if (start + i) % 16:
                        total, count = total + float(nll[i]), count + 1
        expected = math.exp(total / count)
        assert results.metrics()[f"perplexity/ntk/one_shot/{length}"] == pytest.approx(expected, rel=1e-5)


def test_every_method_protocol_and_length_scores_equally_many_tokens() -> None:
    results = run()
    assert list(results.metrics()) == [
        f"perplexity/{method}/{protocol}/{length}"
        for method in ("none", "ntk")
        for protocol in NAMES
        for length in LENGTHS
    ]
    assert {(score.protocol, score.num_tokens) for score in results.scores} == {
        ("one_shot", 3 * (64 - 4)),
        ("chunked", 3 * (64 - 4)),
        ("per_position", 3 * (64 - 4)),
        ("sliding", 3 * (64 - 1)),
        ("last_k", 3 * (16 - 1)),
    }
    assert [score.t for score in results.scores[:3]] == [1, 2, 4]
    assert results.windows["count"] == 3


def test_window_sums_add_up_to_the_perplexity_in_window_order() -> None:
    both, first = run(num_windows=3), run(num_windows=1)
    for score, alone in zip(both.scores, first.scores, strict=True):
        assert len(score.window_nll) == 3
        assert score.perplexity == pytest.approx(math.exp(sum(score.window_nll) / score.num_tokens))
        assert score.window_nll[0] == pytest.approx(alone.window_nll[0], rel=1e-6)


@pytest.mark.parametrize("settings", [{"chunk_len": 5}, {"chunk_len": 64}, {"chunk_len": 16, "batch_tokens": 100}])
def test_memory_settings_do_not_change_the_numbers(settings: dict[str, int]) -> None:
    expected, changed = run().metrics(), run(**settings).metrics()
    assert changed == pytest.approx(expected, rel=1e-6)


def test_a_cell_whose_numbers_overflow_is_named(caplog) -> None:
    assert run().scores
    assert not caplog.messages
    model = build_tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    results = run(model=model, methods=(Method.none,))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [line.split(":")[0] for line in caplog.messages] == [score.key for score in results.scores]
    assert (
        "perplexity is nan: activations or losses overflow within 16 tokens; try engine.precision=fp32" in caplog.text
    )


def test_the_methods_use_different_frequencies_on_the_same_weights() -> None:
    methods = (Method.trained, Method.none, Method.pi, Method.ntk, Method.random_pos, Method.lm_infinite)
    metrics = run(methods=methods).metrics()
    at_training_length = {metrics[f"perplexity/{m.value}/one_shot/16"] for m in methods}
    assert max(at_training_length) == pytest.approx(min(at_training_length), rel=1e-6)
    beyond = {m.value: metrics[f"perplexity/{m.value}/one_shot/64"] for m in methods}
    assert beyond["trained"] == beyond["none"] == beyond["random_pos"]
    assert len({round(value, 6) for value in beyond.values()}) == 3


def test_the_progress_bar_ends_full_and_weights_long_spans(monkeypatch) -> None:
    bars, make = [], progress.bar
    monkeypatch.setattr(progress, "bar", lambda *args, **settings: bars.append(make(*args, **settings)) or bars[-1])
    run(methods=(Method.none,), chunk_len=7, batch_tokens=50)
    assert bars[0].n == bars[0].total
    assert "64 tokens: 100 %" in str(bars[0])
    tokens = sum(job.length * len(job.spans) * 3 for job in jobs(READINGS, CONTEXT_LEN))
    assert tokens < bars[0].total < 2 * tokens


def test_the_handle_and_the_model_are_restored() -> None:
    model = build_tiny_llama().train()
    handle = install_rotary(model, CONTEXT_LEN)
    before = tables([Method.pi], base_rope(handle), 64)["pi"]
    handle.use(before)
    chosen = tables([Method.none], base_rope(handle), 64)
    evaluate(model, handle, chosen, random_windows(1, 64), READINGS, chunk_len=64, device=CPU)
    assert handle.table is before
    assert model.training


def test_a_length_beyond_a_table_is_refused_before_the_first_forward() -> None:
    model = build_tiny_llama()
    handle = install_rotary(model, CONTEXT_LEN)
    short = tables([Method.none], base_rope(handle), 32)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    with pytest.raises(ValueError, match="num_tokens=64"):
        evaluate(model, handle, short, random_windows(1, 64), READINGS)


@pytest.mark.parametrize(("num_pieces", "batch", "world_size"), [(12, 5, 2), (7, 2, 3), (1, 4, 4), (6, 6, 1)])
def test_ranks_get_equal_batches_and_every_piece_counts_once(num_pieces: int, batch: int, world_size: int) -> None:
    hands = [list(rank_batches(num_pieces, batch, rank, world_size)) for rank in range(world_size)]
    assert len({tuple(len(indices) for indices, _ in hand) for hand in hands}) == 1
    counted = np.concatenate([indices[counts] for hand in hands for indices, counts in hand])
    assert sorted(counted.tolist()) == list(range(num_pieces))


def test_two_ranks_match_one_with_equal_numbers_of_forwards(tmp_path: Path) -> None:
    call_on_two_ranks(_rank_main, str(tmp_path))
    expected = run().scores
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["bar"][0] == first["bar"][1] > 0
    assert first["forwards"] == second["forwards"]
    assert first["window_nll"] == second["window_nll"]
    for ours, theirs in zip(expected, first["window_nll"], strict=True):
        assert theirs == pytest.approx(ours.window_nll, rel=1e-6)


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    forwards = []
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: forwards.append(1) if type(module).__name__ == "LlamaForCausalLM" else None
    )
    bars, make = [], progress.bar
    progress.bar = lambda *args, **settings: bars.append(make(*args, **settings)) or bars[-1]
    results = run()
    content = {
        "bar": [bars[0].n, bars[0].total],
        "forwards": len(forwards),
        "window_nll": [score.window_nll for score in results.scores],
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()
