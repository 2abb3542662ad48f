"""The runner of measures: models with known answers, references without a cache, resuming, one and two ranks."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from clex_train.attention import kv_cache
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.measures import Measure
from clex_train.config.method import Method
from clex_train.evaluation import methods, partial_results
from clex_train.evaluation.measure_scores import MeasureScore, measure_metrics, measure_tables, to_row
from clex_train.evaluation.partial_results import resume
from clex_train.evaluation.results import Missing, measure_score
from clex_train.evaluation.runner import Feeding
from clex_train.measures import runner
from clex_train.measures.plan import Cell
from clex_train.rope.patch import install_rotary
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import StopRequested
from tests.helpers.warm_processes import call_on_two_ranks
from tests.measures.forced_models import ForcedLlama, expected_nll, make_cells, text_store
from tests.retrieval import copying_llama
from tests.retrieval.copying_llama import CONTEXT_LEN
from tests.retrieval.local_tokenizers import byte_level
from tests.retrieval.test_retrieval_runner import small_llama

CPU = torch.device("cpu")
SPEC = EvaluationConfig(n_local=40, n_global=4)


def run(
    model: Any, cells: list[Cell], chosen: tuple[Method, ...] = (Method.none,), **settings: Any
) -> tuple[list[MeasureScore], list[Missing]]:
    handle = install_rotary(model, CONTEXT_LEN)
    tables = methods.tables(chosen, methods.base_rope(handle), 320, SPEC)
    inserted = methods.insertions(SPEC, model, CONTEXT_LEN)
    feeding = Feeding(**{"chunk_len": 100, "batch_tokens": 640, "device": CPU, **settings})
    try:
        return runner.evaluate(model, handle, tables, cells, feeding, inserted)
    finally:
        handle.undo()


def test_a_copying_model_finds_every_key_with_the_known_probabilities(tokenizer: Any, store: TokenStore) -> None:
    cells = make_cells(tokenizer, store, *Measure)
    vocab_size = len(tokenizer)
    scores, missing = run(copying_llama.build(vocab_size, make=ForcedLlama), cells)
    assert missing == []
    for cell in cells:
        for i, place in enumerate(cell.places):
            rows = {
                s.quantity: s
                for s in scores
                if (s.measure, s.length, s.place) == (cell.measure.value, cell.length, place)
            }
            pairs = [cell.pair(number) for number in range(3 * i, 3 * i + 3)]
            right, other = (
                [expected_nll(pair.rows[k].tolist(), pair.num_scored, vocab_size) for pair in pairs] for k in (0, 1)
            )
            assert rows["nll"].sums == pytest.approx(right, rel=1e-5)
            assert rows["nll"].groups == [pair.group for pair in pairs]
            gap = rows["gain" if cell.measure is Measure.repetition else "gap"]
            assert gap.sums == pytest.approx([b - a for a, b in zip(right, other, strict=True)], rel=1e-4, abs=1e-4)
            assert gap.value > 1
            if cell.measure is not Measure.repetition:
                assert rows["exact"].sums == [1.0] * 3
    wrong, _ = run(copying_llama.build(vocab_size, shift=1, make=ForcedLlama), cells)
    assert {row.value for row in wrong if row.quantity == "exact"} == {0.0}


@pytest.mark.parametrize("method", [Method.none, Method.ntk, Method.lm_infinite])
def test_scores_equal_full_forwards_without_a_cache(store: TokenStore, tokenizer: Any, method: Method) -> None:
    model = small_llama(len(tokenizer))
    (cell,) = make_cells(tokenizer, store, Measure.forced_passkey, task_lengths=[320], num_prompts=2)
    found = [run(model, [cell], (method,), chunk_len=size)[0] for size in (1000, 64)]
    handle = install_rotary(model, CONTEXT_LEN)
    handle.use(methods.tables([method], methods.base_rope(handle), 320, SPEC)[method.value])
    put_in = methods.insertions(SPEC, model, CONTEXT_LEN).get(method.value)
    expected = []
    with torch.no_grad(), handle.fixed(320):
        inserted = put_in() if put_in else None
        if inserted:
            inserted.__enter__()
        for number in range(4):
            pair = cell.pair(number)
            logits = model(torch.from_numpy(pair.rows), use_cache=False).logits.double()
            nll = -logits[:, :-1].log_softmax(-1).gather(2, torch.from_numpy(pair.rows)[:, 1:, None])[..., 0]
            expected.append(nll[:, -pair.num_scored :].sum(1).tolist())
        if inserted:
            inserted.__exit__(None, None, None)
    handle.undo()
    for scores in found:
        nll = [value for row in scores if row.quantity == "nll" for value in row.sums]
        gap = [value for row in scores if row.quantity == "gap" for value in row.sums]
        assert nll == pytest.approx([right for right, _ in expected], rel=1e-4)
        assert gap == pytest.approx([wrong - right for right, wrong in expected], rel=1e-3, abs=1e-3)


def test_equal_methods_are_copied_and_a_stop_request_is_honoured(store: TokenStore, tokenizer: Any) -> None:
    cells = make_cells(tokenizer, store, Measure.forced_passkey, task_lengths=[100], depths=[0.5])
    model = copying_llama.build(len(tokenizer), make=ForcedLlama)
    scores, _ = run(model, cells, (Method.none, Method.ntk))
    assert {row.copied_from for row in scores if row.method == "none"} == {""}
    copied = [row for row in scores if row.method == "ntk"]
    assert [row.copied_from for row in copied] == [f"forced_passkey_{q}/none/100" for q in ("exact", "nll", "gap")]
    with pytest.raises(StopRequested):
        run(model, cells, interrupted=lambda: True)


def test_a_length_that_runs_out_of_memory_is_missing_and_the_other_is_scored(store: TokenStore, tokenizer: Any) -> None:
    model = copying_llama.build(len(tokenizer), make=ForcedLlama)

    def fill_up(_: object, args: object, inputs: dict[str, Any]) -> None:
        if (past := kv_cache.find_in_call((), inputs)) is not None and past.get_seq_length() > 160:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(fill_up, with_kwargs=True)
    scores, missing = run(model, make_cells(tokenizer, store, Measure.forced_passkey))
    assert {row.length for row in scores} == {160}
    assert missing == [Missing("none", "forced_passkey", 320, "rank 0: CUDA out of memory.")]


def test_an_interrupted_cell_resumes_to_the_same_bits(
    store: TokenStore, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_results, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(partial_results, "WRITES", 0)
    model, cells = small_llama(len(tokenizer)), make_cells(tokenizer, store, Measure.forced_passkey, Measure.repetition)
    whole, _ = run(model, cells)
    calls, reader = [], runner.read_tails

    def counted(*args: Any) -> Any:
        calls.append(1)
        return reader(*args)

    monkeypatch.setattr(runner, "read_tails", counted)
    run(model, cells)
    total, most = len(calls), len(calls) // 2 + 1
    calls.clear()
    with pytest.raises(StopRequested):
        run(model, cells, kept=resume(tmp_path / "x.json", {}), interrupted=lambda: len(calls) == most)
    resumed, _ = run(model, cells, kept=resume(tmp_path / "x.json", {}))
    assert len(calls) == total, "no batch was read twice"
    assert resumed == whole


def test_scores_survive_json_and_overflow_becomes_null(tokenizer: Any) -> None:
    score = MeasureScore("repetition", "nll", "none", 256, 64, [math.inf, 2.0], [3, 2], [0, 1], 0)
    row = json.loads(json.dumps(to_row(score), allow_nan=False))
    assert (row["value"], row["sums"]) == (None, [None, 2.0])
    assert math.isnan(measure_score(row).sums[0])
    scores = [
        MeasureScore("forced_passkey", "exact", "none", 128, depth, sums, [1, 1], [0, 1], 0, 0.25)
        for depth, sums in ((0.0, [1.0, 0.0]), (1.0, [1.0, 1.0]))
    ]
    assert measure_score(json.loads(json.dumps(to_row(scores[0])))) == scores[0]
    assert measure_metrics(scores) == {"forced_passkey_exact/none/128": 0.75}
    lines = [line.split() for line in measure_tables(scores).splitlines()]
    assert ["none,", "depth", "0", "50", "±25"] in lines
    assert ["none,", "depth", "1", "100", "±25"] in lines


def test_two_ranks_match_one_with_equal_numbers_of_forwards(tmp_path: Path) -> None:
    text_store(byte_level(), tmp_path / "store")
    call_on_two_ranks(_rank_main, str(tmp_path))
    expected = _rows(tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["forwards"] == second["forwards"] > 0
    assert first["rows"] == second["rows"]
    assert first["rows"] == expected


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Score prompts whose number of rows is odd for no batch, one row at a time, so that all batches are equal."""
    tokenizer, store = byte_level(), TokenStore(folder / "store").split("validation")
    cells = make_cells(tokenizer, store, Measure.forced_passkey, Measure.repetition, task_lengths=[160], depths=[0.5])
    scores, _ = run(small_llama(len(tokenizer)), cells, batch_tokens=1)
    return [to_row(score) for score in scores]


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    forwards: list[int] = []
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: forwards.append(1) if type(module).__name__ == "LlamaForCausalLM" else None
    )
    content = {"rows": _rows(Path(folder)), "forwards": len(forwards)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()
