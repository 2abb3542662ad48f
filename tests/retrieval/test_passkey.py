"""Passkey prompts: length, depth of the key, and determinism."""

import itertools
import re
from typing import Any

import pytest

from clex_train.config.retrieval import Task
from clex_train.retrieval.plan import Cell
from tests.retrieval.small_cells import make_cells

TASKS = [Task.passkey, Task.passkey_infinitebench]
DEPTHS = (0.0, 0.3, 0.5, 1.0)


def cell(tokenizer: Any, task: Task, length: int, seed: int = 0, num_prompts: int = 3) -> Cell:
    return Cell(task, length, DEPTHS, num_prompts, seed, tokenizer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [256, 511, 2048, 9000])
def test_prompt_and_answer_fill_the_length_to_within_a_sentence(tokenizer: Any, task: Task, length: int) -> None:
    made = cell(tokenizer, task, length)
    for number in range(made.size):
        prompt = made.prompt(number)
        assert len(prompt.ids) <= made.prompt_len
        assert len(prompt.ids) > made.prompt_len - 24
    assert made.prompt_len + made.num_new == length


@pytest.mark.parametrize("task", TASKS)
def test_the_key_is_at_its_depth_in_tokens(tokenizer: Any, task: Task) -> None:
    made = cell(tokenizer, task, 6000)
    for number in range(made.size):
        prompt, depth = made.prompt(number), DEPTHS[number // made.num_prompts]
        text = tokenizer.decode(prompt.ids)
        before = tokenizer.encode(text[: text.index("The pass key is")], add_special_tokens=False)
        assert len(before) / len(prompt.ids) == pytest.approx(depth, abs=150 / 6000)


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_is_in_the_text_and_the_prompt_ends_with_the_question(tokenizer: Any, task: Task) -> None:
    made = cell(tokenizer, task, 700)
    for number in range(made.size):
        prompt = made.prompt(number)
        text, (key,) = tokenizer.decode(prompt.ids, skip_special_tokens=True), prompt.answers
        assert re.fullmatch(r"[1-9]\d{4}", key)
        assert text.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
        assert set(re.findall(r"\d+", text)) == {key}
        assert text.endswith("The pass key is")


def test_a_prompt_depends_only_on_seed_task_length_and_index(byte_tokenizer: Any) -> None:
    def prompts(task: Task, length: int, seed: int, num_prompts: int) -> dict[tuple[float, int], Any]:
        made = cell(byte_tokenizer, task, length, seed, num_prompts)
        return {(DEPTHS[n // num_prompts], n % num_prompts): made.prompt(n) for n in range(made.size)}

    first, again, more = prompts(TASKS[0], 400, 0, 3), prompts(TASKS[0], 400, 0, 3), prompts(TASKS[0], 400, 0, 5)
    assert first == again
    assert all(more[place] == prompt for place, prompt in first.items())
    for depth, index in itertools.product(DEPTHS, range(3)):
        assert first[depth, index].answers == first[0.0, index].answers
    keys = {
        made[0.0, index].answers
        for made in (first, prompts(TASKS[1], 400, 0, 3), prompts(TASKS[0], 401, 0, 3), prompts(TASKS[0], 400, 1, 3))
        for index in range(3)
    }
    assert len(keys) == 12


def test_the_two_prompt_forms_follow_their_publications(byte_tokenizer: Any) -> None:
    lines, paragraphs = (
        byte_tokenizer.decode(cell(byte_tokenizer, task, 500).prompt(4).ids).split(separator)
        for task, separator in zip(TASKS, ("\n", "\n\n"), strict=True)
    )
    assert [line.startswith("The pass key is") for line in lines] == [False, False, True, False, False]
    assert len(paragraphs) == 4
    assert " The pass key is" in paragraphs[1]
    assert paragraphs[2:] == ["What is the pass key?", "The pass key is"]


@pytest.mark.parametrize("task", TASKS)
def test_a_refusal_names_the_shortest_length_that_fits(tokenizer: Any, task: Task) -> None:
    with pytest.raises(ValueError, match=f"evaluation.task_lengths=20: {task.value} needs at least") as refusal:
        make_cells(tokenizer, [task], [20, 4000], DEPTHS, 1)
    shortest = int(re.findall(r"at least (\d+)", str(refusal.value))[0])
    made = Cell(task, shortest, DEPTHS, 1, 0, tokenizer)
    assert len(made.prompt(0).ids) <= made.prompt_len
    with pytest.raises(ValueError, match=f"={shortest - 1}: "):
        Cell(task, shortest - 1, DEPTHS, 1, 0, tokenizer)
