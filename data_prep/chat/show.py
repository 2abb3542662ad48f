"""`show`: print conversations of a store, with the tokens that the loss counts marked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from clex_train.console.program import echo
from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import renamed_key, require
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.seeding import generator
from data_prep.chat.config import Color, ShowVerb

GREEN, PLAIN = "\x1b[30;42m", "\x1b[0m"
BRACKETS = ("[[", "]]")


def run(config: ShowVerb) -> None:
    """Print the conversations.

    Raises:
        InputError: `store` is not a store, or is damaged.
    """
    require(config.store is not None, "store", config.store, "name the directory of a token store: store=corpora/chats")
    with renamed_key("data.path", "store"):
        store = TokenStore(str(config.store))
        store = store if config.split == "train" else store.split(config.split)
    # Imported late: it takes seconds. Not AutoTokenizer, which may ask to run a tokenizer's Python code.
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(store.tokenizer_path / "tokenizer.json"))
    in_color = config.color is Color.always or (config.color is Color.auto and sys.stdout.isatty())
    marks = (GREEN, PLAIN) if in_color else BRACKETS
    if store.manifest.is_masked:
        print(f"{store.path}: the loss counts the tokens in {marks[0]}these marks{marks[1]}", flush=True)
    else:
        echo(f"{store.path}: a store without a mask; the loss counts every token")
    chosen = generator(0, "show").permutation(store.num_documents)[: config.count]
    for doc_id in sorted(map(int, chosen)):
        start, stop = store.span(doc_id)
        scored = store.scored(start, stop)
        counted = stop - start if scored is None else int(scored.sum())
        echo(f"\n--- document {doc_id} ({store.place(doc_id)}): {stop - start:,} tokens, {counted:,} scored")
        # Not echo, which would print the colours as escapes; `marked` has escaped what the text has of its own.
        print("".join(marked(store.tokens(start, stop), scored, tokenizer, marks)), flush=True)


def marked(
    tokens: np.ndarray, scored: np.ndarray | None, tokenizer: Tokenizer, marks: tuple[str, str]
) -> Iterator[str]:
    """Yield the text of a document's tokens, the scored ones between `marks`.

    Args:
        tokens: ids [n].
        scored: bool [n]; None marks nothing.
        tokenizer: decodes the ids.
        marks: what stands before and behind scored text.
    """
    if scored is None:
        yield _printable(tokenizer.decode(tokens.tolist()))
        return
    borders = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(tokens)]
    for start, stop in pairwise(borders):
        text = _printable(tokenizer.decode(tokens[start:stop].tolist()))
        yield f"{marks[0]}{text}{marks[1]}" if scored[start] else text


def _printable(text: str) -> str:
    # Escape sequences inside a conversation would change the colours that show the mask.
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
