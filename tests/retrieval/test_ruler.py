"""RULER's tasks and the needle in real text: hidden items, their places, and the expected answers."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clex_train.config.retrieval import DOWNLOADED, GROUPS, Task, expand
from clex_train.retrieval import words
from clex_train.retrieval.haystack import FILLER, Documents
from clex_train.retrieval.plan import Cell
from clex_train.retrieval.tasks import TASKS
from tests.retrieval.local_tokenizers import TEXTS
from tests.retrieval.small_cells import documents_of, make_cells

LENGTH = 3000
NIAH = [task for task in Task if task.value.startswith("niah")]
GENERATED = [task for task in Task if task not in DOWNLOADED and task not in GROUPS]


@pytest.fixture(scope="module")
def documents(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return documents_of(TEXTS, tokenizer, tmp_path_factory.mktemp("texts") / "store")


def cell(tokenizer: Any, documents: Documents, task: Task, length: int = LENGTH, **settings: Any) -> Cell:
    given: dict[str, Any] = {"depths": (0.0, 0.5, 1.0), "num_prompts": 3, **settings}
    (made,) = make_cells(tokenizer, [task], [length], documents=documents, **given)
    return made


def text_of(made: Cell, number: int) -> str:
    return str(made.tokenizer.decode(made.prompt(number).ids, skip_special_tokens=True))


def test_every_task_that_can_be_generated_is_offered() -> None:
    assert set(TASKS) == set(GENERATED)
    assert len(expand([Task.ruler])) == 13 - len(DOWNLOADED)
    assert expand([Task.vt, Task.ruler, Task.passkey]).count(Task.vt) == 1


@pytest.mark.parametrize("task", GENERATED)
def test_prompts_fill_the_length_and_are_deterministic(tokenizer: Any, documents: Documents, task: Task) -> None:
    made, again, other = (cell(tokenizer, documents, task, seed=seed) for seed in (0, 0, 1))
    for number in range(0, made.size, 2):
        prompt = made.prompt(number)
        # The longest unit of filler is a sentence with two UUIDs, about a hundred tokens.
        assert made.prompt_len - 120 < len(prompt.ids) <= made.prompt_len
        assert prompt == again.prompt(number)
        assert prompt.answers != other.prompt(number).answers
    assert made.prompt(0).answers != made.prompt(1).answers


@pytest.mark.parametrize("task", [*NIAH, Task.needle])
def test_every_answer_is_once_in_the_text_with_the_queried_key(
    tokenizer: Any, documents: Documents, task: Task
) -> None:
    made = cell(tokenizer, documents, task)
    num_answers = {Task.niah_multivalue: 4, Task.niah_multiquery: 4}.get(task, 1)
    for number in range(made.size):
        text, answers = text_of(made, number), made.prompt(number).answers
        context, _, question = text.rpartition("What ")
        assert len(set(answers)) == num_answers
        for answer in answers:
            assert text.count(answer) == 1
            (key,) = re.findall(rf"(?:for|of) (\S+) is:? {re.escape(answer)}\.", context)
            assert question.count(key) == 2


def test_each_variant_has_its_number_of_other_keys(tokenizer: Any, documents: Documents) -> None:
    def hidden(task: Task) -> list[str]:
        text = text_of(cell(tokenizer, documents, task), 1)
        return re.findall(r"One of the special magic \w+ for (\S+) is:", text)

    counts = {task: (len(hidden(task)), len(set(hidden(task)))) for task in NIAH}
    assert [counts[task] for task in (Task.niah_single_1, Task.niah_single_2, Task.niah_single_3)] == [(1, 1)] * 3
    assert counts[Task.niah_multikey_1] == counts[Task.niah_multiquery] == (4, 4)
    assert counts[Task.niah_multivalue] == (4, 1)
    for task in (Task.niah_multikey_2, Task.niah_multikey_3):
        assert counts[task][0] == counts[task][1] > 20


def test_no_decoy_has_the_queried_key(tokenizer: Any, documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    # So few pairs that the decoys use all of them.
    monkeypatch.setattr(words, "ADJECTIVES", words.ADJECTIVES[:2])
    monkeypatch.setattr(words, "NOUNS", words.NOUNS[:9])
    made = cell(tokenizer, documents, Task.niah_multikey_2)
    for number in range(made.size):
        keys = re.findall(r"One of the special magic \w+ for (\S+) is:", text_of(made, number))
        assert len(keys) == len(set(keys)) > 2 * 9


def test_the_needle_is_between_sentences_of_real_text_at_its_depth(tokenizer: Any, documents: Documents) -> None:
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    made = cell(tokenizer, documents, Task.needle, 4000, depths=depths)
    everything = " ".join(" ".join(TEXTS).split())
    for number in range(made.size):
        prompt, depth = made.prompt(number), depths[number // made.num_prompts]
        text = text_of(made, number)
        place = text.index("The secret number")
        before = tokenizer.encode(text[:place], add_special_tokens=False)
        # A needle moves back to the end of a sentence: at most 600 characters, here about 300 tokens.
        assert depth - 350 / 4000 < len(before) / len(prompt.ids) < depth + 60 / 4000
        needle = re.search(r"\s?The secret number of \S+ is \d+\.\s?", text)
        assert needle is not None
        context = " ".join(text[: needle.start()].partition("\n\n")[2].split())
        assert context[-200:] in everything


def test_real_text_wraps_around_at_the_end_of_the_store(tokenizer: Any, tmp_path: Path) -> None:
    small = documents_of(["It rained. Nobody came.", "The bridge held."], tokenizer, tmp_path / "store")
    first, second = small.starting_at(0.99)(60, [0.5])
    assert (first + second).startswith("The bridge held.\n\nIt rained. Nobody came.\n\nThe bridge held.\n\nIt rained")
    assert 0 <= len(second) - len(first) < 60
    assert first.rstrip().endswith(".")


def test_a_chain_of_variables_leads_to_the_number_in_order(tokenizer: Any, documents: Documents) -> None:
    made = cell(tokenizer, documents, Task.vt)
    for number in range(made.size):
        text, answers = text_of(made, number), made.prompt(number).answers
        first, *others = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text)
        assert len(answers) == 5
        assert [name for name, _ in (first, *others)] == list(answers)
        assert [source for _, source in others] == list(answers[:-1])
        assert text.count(first[1]) == 3
        assert FILLER[0] in text


@pytest.mark.parametrize(("length", "counts"), [(3000, (6, 1)), (6000, (30, 3))])
def test_common_words_are_the_most_common(tokenizer: Any, documents: Documents, length: int, counts: Any) -> None:
    made = cell(tokenizer, documents, Task.cwe, length)
    for number in range(made.size):
        text = text_of(made, number)
        numbered = re.findall(r"(\d+)\. ([a-z-]+)", text)
        tally = Counter(word for _, word in numbered)
        assert [int(index) for index, _ in numbered] == list(range(1, len(numbered) + 1))
        assert {word for word, _ in tally.most_common(10)} == set(made.prompt(number).answers)
        assert set(tally.values()) == set(counts)
        assert len(tally) > 30


@pytest.mark.parametrize("length", [1000, 3000])
def test_frequent_words_are_the_most_frequent_by_a_clear_margin(
    tokenizer: Any, documents: Documents, length: int
) -> None:
    made = cell(tokenizer, documents, Task.fwe, length)
    for number in range(made.size):
        listed = text_of(made, number).split("\n")[1].split()
        (dots, most), *rest = Counter(listed).most_common()
        assert dots == "..."
        assert tuple(word for word, _ in rest[:3]) == made.prompt(number).answers
        assert rest[0][1] > rest[1][1] > rest[2][1] > rest[3][1]
        assert most / len(listed) == pytest.approx(6 / 3.1416**2, abs=0.08)


def test_a_full_answer_scores_one_and_half_an_answer_half(tokenizer: Any, documents: Documents) -> None:
    made = cell(tokenizer, documents, Task.niah_multivalue)
    answers = made.prompt(0).answers
    assert made.judge(0, ", ".join(answers)) == 1
    assert made.judge(0, ", ".join(answers[:2])) == 0.5
    written = tokenizer.encode(" " + ", ".join(answers), add_special_tokens=False)
    assert len(written) < made.num_new
