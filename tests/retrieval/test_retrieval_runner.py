"""The retrieval runner: models with known answers, references without a cache, one and two ranks."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from clex_train.attention import kv_cache
from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.method import Method
from clex_train.config.retrieval import Task
from clex_train.evaluation import methods, retrieval_runner
from clex_train.evaluation.console import retrieval_table
from clex_train.evaluation.results import Missing
from clex_train.evaluation.task_scores import TaskScore, task_metrics
from clex_train.retrieval.haystack import Documents
from clex_train.retrieval.plan import Cell
from clex_train.retrieval.tasks import TASKS
from clex_train.rope import preallocated_cache
from clex_train.rope.hf_scalings import base_rope
from clex_train.rope.patch import RotaryHandle, install_rotary
from clex_train.scaling.frequency_table import Frequencies
from clex_train.utils.errors import StopRequested
from tests.helpers.warm_processes import call_on_two_ranks
from tests.retrieval import copying_llama
from tests.retrieval.copying_llama import CONTEXT_LEN, AnsweringLlama
from tests.retrieval.local_tokenizers import TEXTS, byte_level
from tests.retrieval.small_cells import documents_of, make_cells

LENGTHS = [256, 512]
DEPTHS = [0.0, 0.5, 1.0]
CPU = torch.device("cpu")
SPEC = EvaluationConfig(n_local=40, n_global=4)
METHODS = [method for method in Method if method not in (Method.clex, Method.longrope)]
"""Methods that a plain Llama supports without further inputs."""


@pytest.fixture(scope="module")
def documents(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return documents_of(TEXTS, byte_tokenizer, tmp_path_factory.mktemp("texts") / "store")


def tables_of(handle: RotaryHandle, chosen: Sequence[Method], longest: int) -> dict[str, Frequencies]:
    return methods.tables(chosen, base_rope(handle), longest, SPEC)


def run(
    model: Any, cells: list[Cell], chosen: tuple[Method, ...] = (Method.none,), longest: int = 512, **settings: Any
) -> list[TaskScore]:
    handle = install_rotary(model, CONTEXT_LEN)
    frequencies = tables_of(handle, chosen, longest)
    inserted = methods.insertions(SPEC, model, CONTEXT_LEN)
    try:
        scores, missing = retrieval_runner.evaluate(
            model, handle, frequencies, cells, **{"chunk_len": 100, "device": CPU, "inserted": inserted, **settings}
        )
        assert missing == []
        return scores
    finally:
        handle.undo()


def cells_of(tokenizer: Any, tasks: tuple[Task, ...] = (Task.passkey,), num_prompts: int = 2) -> list[Cell]:
    return make_cells(tokenizer, tasks, LENGTHS, DEPTHS, num_prompts, seed=0)


def test_a_copying_model_answers_all_prompts_and_a_shifted_one_none(tokenizer: Any) -> None:
    cells = cells_of(tokenizer, (Task.passkey, Task.passkey_infinitebench))
    right, wrong = (run(copying_llama.build(len(tokenizer), shift), cells) for shift in (0, 1))
    assert [(row.correct, row.total, row.score) for row in right] == [(2, 2, 1.0)] * 12
    assert [(row.correct, row.total, row.score) for row in wrong] == [(0, 2, 0.0)] * 12
    assert [(row.task, row.length, row.depth) for row in right[:4]] == [
        ("passkey", 256, 0.0),
        ("passkey", 256, 0.5),
        ("passkey", 256, 1.0),
        ("passkey", 512, 0.0),
    ]


@pytest.mark.parametrize("task", list(TASKS))
def test_known_answers_score_one_in_every_task_and_swapped_ones_zero(
    byte_tokenizer: Any, documents: Documents, task: Task
) -> None:
    (cell,) = make_cells(byte_tokenizer, [task], [1200], DEPTHS, 2, documents=documents)
    prompts = [cell.prompt(number) for number in range(cell.size)]
    said = [byte_tokenizer.encode(" " + ", ".join(prompt.answers)) for prompt in prompts]
    model = copying_llama.build(len(byte_tokenizer), make=AnsweringLlama)
    model.end = byte_tokenizer.eos_token_id
    for answers, share in ((said, 1.0), (said[1:] + said[:1], 0.0)):
        model.answers = {tuple(prompt.ids): answer for prompt, answer in zip(prompts, answers, strict=True)}
        rows = run(model, [cell], longest=1200, chunk_len=500)
        assert sum(row.score for row in rows) / len(rows) == share


def small_llama(vocab_size: int) -> LlamaForCausalLM:
    """Build random weights large enough for every position to matter, in float64 to avoid near ties."""
    config = copying_llama.build(vocab_size).config
    # Two layers, because in one layer keys computed at another t would be equal once they are re-rotated.
    config.num_hidden_layers = 2
    model = LlamaForCausalLM(config).double()
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_decodes_like_full_forwards_without_a_cache(
    byte_tokenizer: Any, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cell = small_llama(len(byte_tokenizer)), cells_of(byte_tokenizer, num_prompts=1)[0]
    heard: list[str] = []
    monkeypatch.setattr(Cell, "judge", lambda self, number, generation: heard.append(generation) or 0.0)
    run(model, [cell], (method,))
    handle = install_rotary(model, CONTEXT_LEN)
    handle.use(tables_of(handle, [method], 512)[method.value])
    put_in = methods.insertions(SPEC, model, CONTEXT_LEN).get(method.value)
    expected = []
    with torch.no_grad(), handle.pinned(2.0):
        inserted = put_in() if put_in else None
        if inserted:
            inserted.__enter__()
        for number in range(cell.size):
            ids = cell.prompt(number).ids
            for _ in range(cell.num_new):
                ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
            expected.append(byte_tokenizer.decode(ids[-cell.num_new :], skip_special_tokens=True))
        if inserted:
            inserted.__exit__(None, None, None)
    assert heard == expected
    assert len(set(expected)) > 1


def test_the_chunks_of_a_prompt_do_not_change_the_result(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cells = small_llama(len(byte_tokenizer)), cells_of(byte_tokenizer, num_prompts=1)
    heard: list[str] = []
    monkeypatch.setattr(Cell, "judge", lambda self, number, generation: heard.append(generation) or 0.0)
    for chunk_len in (1000, 64, 11):
        run(model, cells, chunk_len=chunk_len)
    assert heard[:6] == heard[6:12] == heard[12:]


def test_a_metric_is_the_mean_over_depths_and_accompanies_the_grid(byte_tokenizer: Any) -> None:
    rows = [
        TaskScore("passkey", "none", 256, 0.0, 4, 4, 1.0),
        TaskScore("passkey", "none", 256, 1.0, 1, 4, 0.25),
        TaskScore("passkey", "none", 512, 0.0, 0, 4, 0.0),
        TaskScore("vt", "none", 512, None, 0, 4, 0.6),
    ]
    assert task_metrics(rows) == {"passkey/none/256": 0.625, "passkey/none/512": 0.0, "vt/none/512": 0.6}
    printed = [line.split() for line in retrieval_table(rows).splitlines()]
    assert ["0", "100", "0"] in printed
    assert ["1", "25", "-"] in printed
    assert ["vt,", "none", "60"] in printed


def test_a_row_records_prompt_expected_answer_and_generation(byte_tokenizer: Any) -> None:
    (cell,) = cells_of(byte_tokenizer, num_prompts=3)[:1]
    scores = run(copying_llama.build(len(byte_tokenizer)), [cell])
    assert len(scores) == len(cell.depths)
    for i, row in enumerate(scores):
        assert row.seed == cell.seed
        assert [record["number"] for record in row.prompts] == [3 * i, 3 * i + 1, 3 * i + 2]
        for record in row.prompts:
            prompt = cell.prompt(record["number"])
            hashed = int(retrieval_runner.fingerprint(torch.tensor(prompt.ids))) % 2**64
            assert record["fingerprint"] == f"{hashed:016x}"
            assert record["expected"] == list(prompt.answers)
            assert record["share"] == cell.judge(record["number"], record["given"])
    assert TaskScore(**json.loads(json.dumps(vars(scores[0])))) == scores[0]


def test_table_and_mode_are_restored_and_a_stop_request_is_honoured(byte_tokenizer: Any) -> None:
    model, asked = small_llama(len(byte_tokenizer)).train(), []
    with pytest.raises(StopRequested):
        run(model, cells_of(byte_tokenizer), interrupted=lambda: asked.append(1) or len(asked) == 2)
    assert len(asked) == 2
    assert model.training


def test_a_length_beyond_the_table_is_refused_before_any_forward(byte_tokenizer: Any) -> None:
    model = small_llama(len(byte_tokenizer))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    long = make_cells(byte_tokenizer, [Task.passkey], [1024], DEPTHS, 1, 0)
    with pytest.raises(ValueError, match="num_tokens=1024"):
        run(model, long)


def test_two_ranks_match_one_with_equal_numbers_of_forwards(tmp_path: Path) -> None:
    call_on_two_ranks(_rank_main, str(tmp_path))
    expected = _misread_half()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["forwards"] == second["forwards"] > 0
    assert first["rows"] == second["rows"] == [list(vars(row).values()) for row in expected]
    assert {row.score for row in expected} == {0.0, 1.0}


def _misread_half() -> list[TaskScore]:
    """Score nine prompts (an odd number) of length 256, misreading the key at depth 0.5."""
    tokenizer = byte_level()
    cell = Cell(Task.passkey, 256, tuple(DEPTHS), 3, 0, tokenizer)
    misread = {tuple(cell.prompt(number).ids) for number in range(3, 6)}
    model = copying_llama.build(len(tokenizer))

    def misread_at_half(module: Any, args: Any, kwargs: Any) -> None:
        past = kv_cache.find_in_call((), kwargs)
        seen = (*getattr(past, "seen", []), *kwargs["input_ids"][0].tolist())
        module.shift = int(any(seen[: len(prompt)] == prompt for prompt in misread))

    model.register_forward_pre_hook(misread_at_half, with_kwargs=True)
    return run(model, [cell])


def _rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    forwards = []
    torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: forwards.append(1) if type(module).__name__ == "CopyingLlama" else None
    )
    content = {"rows": [list(vars(row).values()) for row in _misread_half()], "forwards": len(forwards)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(content))
    torch.distributed.destroy_process_group()


def test_a_length_that_runs_out_of_memory_is_missing_and_the_other_is_scored(byte_tokenizer: Any) -> None:
    model, cells = small_llama(len(byte_tokenizer)), cells_of(byte_tokenizer, num_prompts=1)
    handle = install_rotary(model, CONTEXT_LEN)
    full = torch.OutOfMemoryError("CUDA out of memory.")

    def fill_up(_: object, args: object, inputs: dict[str, Any]) -> None:
        if (past := kv_cache.find_in_call((), inputs)) is not None and past.get_seq_length() > 256:
            raise full

    model.register_forward_pre_hook(fill_up, with_kwargs=True)
    tables = tables_of(handle, [Method.none], 512)
    scores, missing = retrieval_runner.evaluate(model, handle, tables, cells, 100, CPU)
    assert {row.length for row in scores} == {256}
    assert missing == [Missing("none", "passkey", 512, "rank 0: CUDA out of memory.")]


def test_a_cache_in_host_memory_changes_no_answer(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cells = small_llama(len(byte_tokenizer)), cells_of(byte_tokenizer, num_prompts=1)
    heard: list[str] = []
    monkeypatch.setattr(Cell, "judge", lambda self, number, generation: heard.append(generation) or 0.0)
    made: list[object] = []
    monkeypatch.setattr(
        retrieval_runner,
        "new_cache",
        lambda *args, **how: made.append(how) or preallocated_cache.new_cache(*args, **how),
    )
    for on_host in (False, True):
        run(model, cells, cache_on_host=on_host)
    assert heard[:6] == heard[6:]
    assert made == [{"on_host": True}] * 6
