"""Render a conversation with a chat template, encode it, and find the tokens that the loss counts.

Spans of the assistant's turns are found in the rendered text: by the template's own `{% generation %}` tags, or else by
prefixes. With R the template and m the messages, turn i is what R(m[:i+1]) adds to R(m[:i]) followed by the generation
prompt. That holds only for templates whose prefixes are prefixes of the whole text, which is checked. The text is
encoded once, and a token counts if it overlaps a span: the end-of-turn token is part of a span.

Control tokens inside messages (`<|im_end|>` in a question about chat templates) are marked before rendering, and
encoded as text: no message can end a turn or begin another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.protocols import Tokenizer
from data_prep.chat.config import Scored
from data_prep.chat.conversations import ASSISTANT, Messages
from data_prep.corpus.bad_record import BadRecord

Span = tuple[int, int]
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Marks around control tokens of messages; Unicode reserves both for such internal use."""
GENERATION = re.compile(r"\{%-?\s*generation\b")
TAGS = (
    "name a template whose assistant turns stand in {% generation %} tags, template=FILE (TRL has such templates for "
    "many models), or set scored=all"
)

REWRITES = "the template renders earlier turns differently once others follow, so the assistant's turns cannot be found"
EXAMPLE = [{"role": role, "content": text} for text in ("first", "second") for role in ("user", ASSISTANT)]
"""Two turns each: a template may render a turn differently once others follow."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a conversation, without the end of the document."""

    ids: np.ndarray
    """int64 [n]."""
    scored: np.ndarray
    """bool [n]: tokens that the loss counts."""


class ChatTemplate:
    """Encodes conversations with the chat template of a tokenizer, or with `text` instead of it.

    Raises:
        ConfigError: there is no template; it cannot be rendered; its spans cannot be found; or the end of a turn is
            outside of them, so that a model would never learn to stop.
    """

    def __init__(self, tokenizer: Tokenizer, text: str | None, scored: Scored) -> None:
        self.text = getattr(tokenizer, "chat_template", None) if text is None else text
        if not isinstance(self.text, str) or not self.text.strip():
            remedy = "there is no chat template; name one, template=FILE, or use the tokenizer of a chat model"
            raise ConfigError("template", None, remedy)
        # The library's own type: the protocol has no offsets, added tokens or options of templates.
        self._tokenizer: Any = tokenizer
        self._scored = scored
        self._has_tags = GENERATION.search(self.text) is not None
        added = [token for token in self._tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        # Added tokens that are not special are control tokens if the template writes them, such as <think>.
        control = [token.content for token in added if token.special or token.content in self.text]
        # The longest first: a token may contain another.
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
        self._newline = self._encode("\n")[0]
        self.stop_id = self._check()

    def encode(self, messages: Messages) -> Encoded:
        """Encode a conversation.

        Raises:
            BadRecord: the template refuses it, its spans cannot be found, or it has the reserved characters U+FDD0 or
                U+FDD1.
        """
        marked = [{**message, "content": self._mark(message["content"])} for message in messages]
        text, spans = self._render(marked)
        parts = [part for part in self._parts(text, spans) if len(part.ids)]
        return Encoded(
            np.concatenate([np.empty(0, np.int64), *(part.ids for part in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(part.scored for part in parts)]),
        )

    def begins_with(self, token: int | None) -> bool:
        """Return True if rendered conversations begin with the token, such as BOS."""
        return int(self.encode(EXAMPLE).ids[0]) == token

    def _check(self) -> int | None:
        """Try the template; return the control token that ends the assistant's turns, None without one."""
        try:
            encoded = self.encode(EXAMPLE)
        except BadRecord as error:
            raise ConfigError("template", None, f"{error}; {error.remedy}") from error
        if not encoded.scored.any():
            remedy = "the template writes no turn of the assistant; name one that writes messages, template=FILE"
            raise ConfigError("template", None, remedy)
        added = self._tokenizer.added_tokens_decoder.items()
        control = {i for i, token in added if self._control.fullmatch(token.content)}
        # Behind the last token of the answer's text; a template may write a newline after the end of a turn.
        last = encoded.ids[np.flatnonzero(encoded.scored)[-3:]].tolist() if encoded.scored.any() else []
        stop = next((token for token in reversed(last) if token in control), None)
        if self._has_tags and stop is None and self._scored is not Scored.all:
            remedy = (
                "the end of a turn is outside of {% generation %}, so a model would not learn to stop; move it inside"
            )
            raise ConfigError("template", None, remedy)
        return stop

    def _render(self, messages: Messages) -> tuple[str, list[Span]]:
        """Render marked messages; return the text and the spans of it that count, in characters."""
        if self._scored is Scored.all:
            text = self._apply(messages)
            return text, [(0, len(text))]
        turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
        text, spans = self._by_tags(messages) if self._has_tags else self._by_prefixes(messages, turns)
        if self._scored is Scored.last:
            if len(spans) != len(turns):
                raise BadRecord(f"{len(turns)} turns have {len(spans)} spans, so the last is not known", TAGS)
            spans = spans[-1:]
        return text, spans

    def _by_prefixes(self, messages: Messages, turns: list[int]) -> tuple[str, list[Span]]:
        text, spans = self._apply(messages), []
        for turn in turns:
            until = self._apply(messages[: turn + 1])
            before = self._apply(messages[:turn], prompt=True) if turn else self._header_of_first(until)
            if not (text.startswith(until) and until.startswith(before)):
                raise BadRecord(REWRITES, TAGS)
            spans.append((len(before), len(until)))
        return text, spans

    def _header_of_first(self, text: str) -> str:
        """Return what a rendered conversation has before the text of its first turn, which is the assistant's."""
        # Templates refuse an empty conversation, so the header is what the generation prompt adds to another one.
        asked = EXAMPLE[:1]
        header = self._apply(asked, prompt=True).removeprefix(self._apply(asked))
        if header not in text:
            raise BadRecord(REWRITES, TAGS)
        return text[: text.index(header) + len(header)]

    def _by_tags(self, messages: Messages) -> tuple[str, list[Span]]:
        found = self._template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        spans: list[Span] = []
        is_open = False
        for (start, stop), inside in zip(found["offset_mapping"], found["assistant_masks"], strict=True):
            if inside and is_open:
                spans[-1] = (spans[-1][0], stop)
            elif inside:
                spans.append((start, stop))
            is_open = bool(inside)
        return self._apply(messages), spans

    def _apply(self, messages: Messages, prompt: bool = False) -> str:
        text: str = self._template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def _template(self, messages: Messages, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, chat_template=self.text, **options)
        except Exception as error:  # jinja2 and templates themselves raise many types
            raise BadRecord(f"the chat template refuses it ({first_line(error)})") from error

    def _mark(self, content: str) -> str:
        if OPEN in content or CLOSE in content:
            raise BadRecord("a turn has the character U+FDD0 or U+FDD1, which Unicode reserves")
        return self._control.sub(f"{OPEN}\\g<0>{CLOSE}", content)

    def _parts(self, text: str, spans: list[Span]) -> Iterator[Encoded]:
        """Encode the rendered text piece by piece, cut at the marks."""
        start = 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", text):
            if piece not in (OPEN, CLOSE) and piece:
                # A template that trims or cuts a message may drop one mark, so what stands before a piece decides.
                is_control = text[start - 1 : start] == OPEN and self._control.fullmatch(piece) is not None
                ids, offsets = self._encode_control(piece) if is_control else self._encode(piece, is_first=start == 0)
                yield Encoded(ids, _overlaps(offsets + start, spans))
            start += len(piece)

    def _encode_control(self, token: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a control token as the text that it consists of; ids and offsets as `_encode`."""
        ids, offsets = self._encode(token, is_first=False, as_text=True)
        if self._tokenizer.convert_tokens_to_ids(token) not in ids:
            return ids, offsets
        # An added token that is not special is matched in any text, but not across two texts.
        (ids, offsets), (rest, further) = (self._encode(half, is_first=False) for half in (token[:1], token[1:]))
        return np.concatenate([ids, rest]), np.concatenate([offsets, further + 1])

    def _encode(self, text: str, is_first: bool = True, as_text: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int64 [n] and offsets int64 [n, 2] in characters; `as_text` ignores special tokens."""
        if not is_first:
            # Behind a newline: SentencePiece would write a space before a text that begins with none.
            ids, offsets = self._encode("\n" + text, as_text=as_text)
            count = len(self._newline)
            if ids[:count].tolist() == self._newline.tolist():
                return ids[count:], offsets[count:] - 1
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        found = self._tokenizer(text, split_special_tokens=as_text, **options)
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        return np.array(found["input_ids"], np.int64), offsets


def _overlaps(offsets: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return bool [n]: True for tokens at `offsets` int64 [n, 2] that overlap a span."""
    # A token without characters, such as one of a byte in the middle of a character, has the offsets of its place.
    inside = [(offsets[:, 0] < stop) & (offsets[:, 1] > start) for start, stop in spans]
    scored: np.ndarray = np.any([np.zeros(len(offsets), np.bool_), *inside], axis=0)
    return scored
