"""Write the conversations of a unit of work as documents with a mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clex_train.token_store.manifest import TokenizerInfo
from clex_train.token_store.writer import ShardWriter
from data_prep.chat import conversations
from data_prep.chat.config import Layout, Scored
from data_prep.chat.template import ChatTemplate, Encoded
from data_prep.config import CorpusConfig
from data_prep.corpus.bad_record import BadRecord
from data_prep.corpus.documents import SCORED, TRUNCATED, UNSCORED, Document, lookup, refuse
from data_prep.corpus.readers import place
from data_prep.corpus.sources import Piece
from data_prep.tokenize.encoding import load_tokenizer


@dataclass(frozen=True)
class ChatJob:
    """Settings of a store of conversations that its units share."""

    layout: Layout
    template: str
    scored: Scored
    max_tokens: int | None

    @property
    def keep(self) -> tuple[str, ...]:
        """Fields of a record to read beside `field`."""
        beside = (conversations.SYSTEM, *conversations.TOOLS)
        return (conversations.COMPLETION, *beside) if self.layout is Layout.prompt_completion else beside

    def content(self, fields: Mapping[str, Any], corpus: CorpusConfig) -> bytes:
        """Return the content of a record's document: its messages, serialized."""
        try:
            value = lookup(fields, corpus.text_field)
        except BadRecord as error:
            raise BadRecord(str(error), conversations.remedy(fields)) from error
        return conversations.to_bytes(conversations.read(self.layout, value, fields, corpus.text_field))


def write(
    documents: Iterator[tuple[int, Document]],
    chat: ChatJob,
    corpus: CorpusConfig,
    pieces: Mapping[int, Piece],
    tokenizer: Path,
    facts: TokenizerInfo,
    writers: Mapping[str, ShardWriter],
    counts: Mapping[int, Counter[str]],
    advance: Callable[[int, int, int], object],
) -> None:
    """Encode conversations in order and write them as they come; `counts[source]` is incremented in place.

    Raises `ConfigError` for a conversation that the template refuses, with its place, unless such are left out.
    """
    template = ChatTemplate(load_tokenizer(str(tokenizer)), chat.template, chat.scored)
    for source, document in documents:
        try:
            encoded = template.encode(conversations.from_bytes(document.content))
        except BadRecord as error:
            counts[source]["documents"] -= 1
            refuse(place(pieces[source], document.record), error, corpus, counts[source])
            continue
        whole = end(encoded, facts.eos_id, ends_turn=template.stop_id is not None)
        kept = cut(whole, facts.eos_id, chat.max_tokens)
        # The first token of a document is never predicted.
        if not kept.scored[1:].any():
            counts[source][UNSCORED] += 1
            counts[source]["documents"] -= 1
            continue
        counts[source][TRUNCATED] += len(kept.ids) < len(whole.ids)
        counts[source][SCORED] += int(kept.scored.sum())
        writer = writers[document.split]
        writer.write(kept.ids, kept.scored)
        writer.end_document(document.text_hash, source, document.record)
        advance(0, document.text_bytes, len(kept.ids))


def end(encoded: Encoded, eos_id: int, ends_turn: bool) -> Encoded:
    """Append EOS, which ends every document of a store, unless the template wrote it.

    With `ends_turn`, the last turn ends with a token of its own, and EOS is not scored. Otherwise EOS is all that a
    model can learn to stop at.
    """
    if len(encoded.ids) and encoded.ids[-1] == eos_id:
        return encoded
    is_scored = not ends_turn and bool(encoded.scored[-1:].any())
    return Encoded(np.append(encoded.ids, eos_id), np.append(encoded.scored, is_scored))


def cut(encoded: Encoded, eos_id: int, max_tokens: int | None) -> Encoded:
    """Keep the first `max_tokens` tokens, the last of them EOS, which is not scored then."""
    if max_tokens is None or len(encoded.ids) <= max_tokens:
        return encoded
    ids, scored = encoded.ids[:max_tokens].copy(), encoded.scored[:max_tokens].copy()
    ids[-1], scored[-1] = eos_id, False
    return Encoded(ids, scored)
