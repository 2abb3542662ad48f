"""Forced prompts: their tokens, what they depend on, and settings from which none can be made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clex_train.config.evaluation import EvaluationConfig
from clex_train.config.measures import Measure
from clex_train.measures.filler import Noise, continuation
from clex_train.measures.forced_prompts import RepetitionFrame
from clex_train.token_store.store import TokenStore
from clex_train.token_store.writer import write_store
from clex_train.utils.errors import ConfigError
from tests.measures.forced_models import make_cells

ALL = tuple(Measure)


def test_every_row_has_its_length_and_ends_with_its_answer(tokenizer: Any, store: TokenStore) -> None:
    for cell in make_cells(tokenizer, store, *ALL, bos_id=7):
        for number in range(cell.num_rows // 2):
            rows, num_scored, _ = cell.pair(number)
            assert rows.shape == (2, cell.length)
            assert (rows[:, 0] == 7).all()
            frame = cell.frames[number % len(cell.frames)]
            assert num_scored == frame.answer_len <= cell.tail_len
            answer = frame.number if isinstance(frame, RepetitionFrame) else frame.key
            assert rows[0, -num_scored:].tolist() == answer
            assert np.array_equal(cell.row(2 * number), rows[0])
            assert np.array_equal(cell.row(2 * number + 1), rows[1])


def test_a_passkey_prompt_reads_as_the_training_text_does(tokenizer: Any, store: TokenStore) -> None:
    (cell,) = make_cells(tokenizer, store, Measure.forced_passkey, task_lengths=[320])
    right, wrong = cell.pair(4).rows.tolist()
    text = str(tokenizer.decode(right))
    key = text[-5:]
    assert key.isdigit()
    assert text.count(f" The pass key is {key}. Remember it. {key} is the pass key.") == 1
    assert text.endswith(f" What is the pass key? The pass key is {key}")
    # The whole text has the same ids as its parts, apart from a word that the beginning cuts.
    again = tokenizer.encode(text, add_special_tokens=False)
    assert again[-300:] == right[-300:]
    num_scored = cell.pair(4).num_scored
    assert right[:-num_scored] == wrong[:-num_scored]
    other = str(tokenizer.decode(wrong))[-5:]
    assert other.isdigit()
    assert other != key


def test_the_two_appearances_are_exactly_the_distance_apart(tokenizer: Any, store: TokenStore) -> None:
    (cell,) = make_cells(
        tokenizer, store, Measure.repetition, task_lengths=[400], distances=[150, 200], num_distractors=1
    )
    assert cell.places == (150, 200)
    for number in range(cell.num_rows // 2):
        (stated, without), num_scored, _ = cell.pair(number)
        frame = cell.frames[number % 3]
        assert isinstance(frame, RepetitionFrame)
        second = cell.length - len(frame.cue) - num_scored
        first = second - int(cell.places[number // 3])
        statement = [*frame.cue, *frame.number, *frame.stop]
        assert stated[first : first + len(statement)].tolist() == statement
        assert stated[second:].tolist() == statement[: len(statement) - len(frame.stop)]
        changed = np.flatnonzero(stated != without)
        assert first <= changed.min() <= changed.max() < first + len(statement)
        assert str(tokenizer.decode(without.tolist())).count("The secret number of") == 2, "distractor and second"
        assert str(tokenizer.decode(stated.tolist())).count("The secret number of") == 3


def test_prompts_depend_only_on_seed_measure_length_and_number(tokenizer: Any, store: TokenStore) -> None:
    for measure in ALL:
        few, more = (make_cells(tokenizer, store, measure, num_prompts=count)[0] for count in (2, 4))
        other = make_cells(tokenizer, store, measure, num_prompts=2, seed=1)[0]
        for index in range(2):
            assert np.array_equal(few.pair(index).rows, more.pair(index).rows)
            assert not np.array_equal(few.pair(index).rows, other.pair(index).rows)
        assert not np.array_equal(few.pair(0).rows, few.pair(1).rows)
        # The same tokens at every place, in another order.
        if measure is not Measure.repetition:
            assert sorted(few.pair(0).rows[0]) == sorted(few.pair(2).rows[0])


def test_noise_ends_with_a_whole_sentence_at_every_length(tokenizer: Any) -> None:
    noise = Noise(tokenizer)
    for num_tokens in (0, 1, 7, 100):
        ids, unit = noise.draw(np.random.default_rng(0), num_tokens, 3)
        assert (len(ids), unit) == (num_tokens, 3)
        assert noise.sentence_end(ids, num_tokens) == num_tokens


def test_settings_without_room_are_refused_in_one_line(tokenizer: Any, store: TokenStore) -> None:
    with pytest.raises(ConfigError, match="task_lengths=20: forced_passkey needs at least"):
        make_cells(tokenizer, store, Measure.forced_passkey, task_lengths=[20])
    with pytest.raises(ConfigError, match="none of the 2 held-out documents has"):
        make_cells(tokenizer, store, Measure.forced_passkey, task_lengths=[100_000])
    assert make_cells(tokenizer, store, Measure.forced_passkey_noise, task_lengths=[100_000])
    with pytest.raises(ConfigError, match=r"distances=\[5\]: repetition has no distance that fits 160 tokens"):
        make_cells(tokenizer, store, Measure.repetition, task_lengths=[160], distances=[5])
    with pytest.raises(ConfigError, match=r"distances=5: fits none of the lengths \[400\]"):
        make_cells(tokenizer, store, Measure.repetition, task_lengths=[400], distances=[5, 200])
    with pytest.raises(ConfigError, match="task_lengths=100: repetition has no distance that fits"):
        make_cells(tokenizer, store, Measure.repetition, task_lengths=[100])
    with pytest.raises(ConfigError, match="only repetition has distances"):
        EvaluationConfig(distances=[100])


def test_a_tokenizer_that_cannot_tell_keys_apart_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, ".": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    blind = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=".")
    write_store(tmp_path, {"train": [[0] * 500], "validation": [[0] * 500]}, 2)
    with pytest.raises(ConfigError, match="no other five-digit key"):
        make_cells(blind, TokenStore(tmp_path).split("validation"), Measure.forced_passkey)
    whole = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    joins = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>")
    with pytest.raises(ConfigError, match="does not split between"):
        continuation(joins, " The pass key is")
