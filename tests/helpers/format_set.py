"""Conversations whose answers have a format that no model has by itself: `<<answer>> (checked)`.

Questions are short and plain, so that a small model learns the format from a few hundred of them; whether an answer is
true does not matter.
"""

import re

OPPOSITES = (
    "hot cold, big small, fast slow, light dark, wet dry, old young, loud quiet, early late, rich poor, high low, "
    "open closed, hard soft, full empty, near far, happy sad, strong weak, clean dirty, deep shallow, long short"
)
COLOURS = (
    "grass green, snow white, coal black, blood red, the sky blue, a banana yellow, an orange orange, milk white, "
    "chocolate brown, a rose red, a lemon yellow, the sea blue, ash grey, honey gold, ivory white, a plum purple"
)
SOUNDS = (
    "dog bark, cat meow, cow moo, duck quack, sheep bleat, lion roar, horse neigh, bee buzz, frog croak, owl hoot, "
    "pig oink, wolf howl, snake hiss, bird chirp, mouse squeak, rooster crow, donkey bray, goat bleat"
)
FORMAT = re.compile(r"<<[^<>]+>> \(checked\)")
HELD_OUT = ("What is the opposite of thick?", "Which colour has a tomato?", "Which sound makes a crow?")
"""Questions of each kind that the set does not have."""


def answer(text: str) -> str:
    """Write an answer in the format."""
    return f"<<{text}>> (checked)"


def conversations() -> list[dict[str, list[dict[str, str]]]]:
    """Return the records of the set, in the layout `messages`; every fifth one has two questions."""
    asked = [*_pairs("What is the opposite of {}?", OPPOSITES), *_pairs("Which colour has {}?", COLOURS)]
    asked += _pairs("Which sound makes a {}?", SOUNDS)
    asked += [(f"What is {a} plus {b}?", str(a + b)) for a in range(1, 10) for b in range(1, 10) if (a, b) != (4, 5)]
    turns = [[_turn("user", question), _turn("assistant", answer(text))] for question, text in asked]
    joined = [turns[i] + turns[-i] if i % 5 == 0 else turns[i] for i in range(1, len(turns))]
    return [{"messages": messages} for messages in joined]


def _pairs(question: str, words: str) -> list[tuple[str, str]]:
    parted = [pair.rsplit(" ", 1) for pair in words.split(", ")]
    return [(question.format(first), second) for first, second in parted]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
