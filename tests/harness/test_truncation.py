"""Truncation in the middle: first and last half to the token, room for answer and template, counts."""

import random

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from clex_train.harness.truncation import Message, Shortener, Truncation, cut_middle

TEXT = " ".join(f"{word} {number}" for number, word in enumerate(["under", "the", "wide", "night"] * 60))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with BOS."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT], vocab_size=400, special_tokens=["<s>"])
    trained.post_process = None
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>")
    fast.add_bos_token = True
    return fast


def shortener(tokenizer: PreTrainedTokenizerFast, **given) -> Shortener:
    settings = {"max_length": 100, "max_prompt": None, "truncation": Truncation.middle} | given
    return Shortener(tokenizer.encode, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), **settings)


@pytest.mark.parametrize("room", [2, 3, 20, 61, 64])
def test_the_first_and_the_last_half_stay_to_the_token(tokenizer, room) -> None:
    words = TEXT.split(" ")
    # A token is a word with the space before it, so no seam can join two of them.
    encode = {word: number for number, word in enumerate(dict.fromkeys(words))}
    decode = {number: word for word, number in encode.items()}

    def ids(text: str) -> list[int]:
        return [encode[word] for word in text.split(" ") if word]

    cut = cut_middle(TEXT, room, ids, lambda found: " ".join(decode[one] for one in found) + " ")
    whole, half = ids(TEXT), room // 2
    assert ids(cut) == whole[:half] + whole[-half:]


def test_the_text_is_that_of_the_reference_procedure(tokenizer) -> None:
    whole = tokenizer.encode(TEXT)
    expected = tokenizer.decode(whole[1:30]) + tokenizer.decode(whole[-30:])
    assert tokenizer.decode(whole[:1]) == "<s>", "BOS counts, and is added again behind the cut"
    assert shortener(tokenizer, max_prompt=61).fit("a", TEXT, 10) == expected
    assert expected.startswith("under 0 the 1")
    assert expected.endswith("night 239")


def test_any_prompt_leaves_room_for_its_answer_and_the_template(tokenizer) -> None:
    generator = random.Random(0)
    for answer_len in range(1, 60):
        # Text without spaces, in which halves join to other tokens at the seam.
        text = "".join(generator.choice("abcdeightnr é日") for _ in range(generator.randint(10, 400)))
        one = shortener(tokenizer)
        found = one.fit(0, text, answer_len, around=7)
        assert len(tokenizer.encode(found)) <= 100 - answer_len - 7
        is_long = len(tokenizer.encode(text)) > 100 - answer_len - 7
        assert len(one.shortened) == is_long
        assert is_long or found == text


def test_on_the_left_prompts_are_counted_and_left_to_the_harness(tokenizer) -> None:
    one = shortener(tokenizer, truncation=Truncation.left)
    assert one.fit(3, TEXT, 10) == TEXT
    assert one.fit(4, "under the night", 10) == "under the night"
    assert one.shortened == {3}


def test_the_last_question_of_a_conversation_is_shortened(tokenizer) -> None:
    def render(messages: list[Message]) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<answer>"

    examples = [{"role": "user", "content": "the 1"}, {"role": "assistant", "content": "night"}]
    one = shortener(tokenizer, max_length=160)
    found = one.fit_chat([*examples, {"role": "user", "content": TEXT}], 10, render)
    assert found.startswith("<user>the 1<assistant>night<user>under 0 the 1")
    assert found.endswith("night 239<answer>")
    assert 140 <= len(tokenizer.encode(found)) <= 150
    assert len(one.shortened) == 1
