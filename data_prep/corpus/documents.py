"""Turn records into documents: text field, filter, handling of bad records, and the split by hash.

A document is held out if the first 8 bytes of blake2b(text), as a little endian integer, are below a limit (see
`data_prep/corpus/held_out.py`). Its own text decides, so adding documents moves none to the other split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clex_train.utils import log
from clex_train.utils.errors import ConfigError
from clex_train.utils.files import is_lfs_pointer
from data_prep.config import CorpusConfig, OnBadRecord
from data_prep.corpus.bad_record import BadRecord
from data_prep.corpus.readers import READERS, Raw, Unreadable, chat_remedy, fields_of, key_of, place, remedy
from data_prep.corpus.sources import Piece
from data_prep.corpus.utf8 import Utf8, decode, is_blank

logger = log.get(__name__)

MAX_WARNINGS = 5
"""Bad records to log; the rest are only counted."""
TRUNCATED, UNSCORED, SCORED = "truncated", "without_scored_tokens", "scored_tokens"
"""Counts of conversations that were cut, of those left out because the cut left nothing to learn, and of tokens."""
_MISSING = object()
_LFS_REMEDY = "fetch it by `git lfs pull`"


@dataclass(frozen=True)
class Document:
    """A text in UTF-8 with the fields to keep.

    `record` is its number in the piece, `consumed` the bytes read from disk so far.
    """

    content: bytes
    fields: Mapping[str, Any]
    text_hash: int
    split: str
    record: int
    consumed: int

    @property
    def text(self) -> str:
        """The text, decoded on each access; `utf8.blocks(content)` yields a long text in pieces."""
        return decode(self.content)

    @property
    def text_bytes(self) -> int:
        """Length in bytes of UTF-8."""
        return len(self.content)


def text_content(fields: Mapping[str, Any], corpus: CorpusConfig) -> bytes:
    """Return the text of a record in UTF-8."""
    name = corpus.text_field
    text = _field(fields, name, corpus)
    if not isinstance(text, (str, Utf8)):
        advice = chat_remedy(fields) or "repair it"
        raise BadRecord(f"field {name!r} must be a string, but is {type(text).__name__}", advice)
    content = text.content if isinstance(text, Utf8) else _encode(text)
    # An empty document would still add BOS and EOS to the store.
    if is_blank(content):
        raise BadRecord(f"field {name!r} is empty")
    return content


ContentOf = Callable[[Mapping[str, Any], CorpusConfig], bytes]
"""Makes the content of a document of a record's fields; raises `BadRecord`."""


def documents(
    piece: Piece,
    corpus: CorpusConfig,
    counts: Counter[str],
    keep: Sequence[str] = (),
    below: float = 0.0,
    content_of: ContentOf = text_content,
) -> Iterator[Document]:
    """Yield the documents of a piece, in order.

    Args:
        piece: what to read.
        corpus: text field, filter, split rule and handling of bad records.
        counts: incremented in place: `documents`, `filtered` (by `where`), `bad_records` (skipped).
        keep: further fields of a record to keep if present. No others are converted, so that an unused field cannot
            make a record bad.
        below: documents whose hash value is below go to the validation split.
        content_of: makes the content of a document; its text by default.

    Raises:
        InputError: a bad record under `on_bad_record=error`, or a file that cannot be read to its end; names file,
            line or row, and remedy.
    """
    if piece.format != "hub" and is_lfs_pointer(piece.path):
        refuse(piece.path, BadRecord("a git-lfs pointer instead of the file itself", _LFS_REMEDY), corpus, counts)
        return
    reader = READERS[piece.format]
    # Readers convert only these fields, the text first.
    names = [*fields_of(corpus), *keep]
    for raw in reader.read(piece, corpus, names):
        try:
            document = _document(raw, reader.parse(raw.take(), names), corpus, keep, below, content_of)
        # A damaged file is never skipped: the rest of its records would be lost without a trace.
        except Unreadable:
            raise
        except BadRecord as error:
            refuse(place(piece, raw.number), error, corpus, counts)
            continue
        counts["filtered" if document is None else "documents"] += 1
        if document is not None:
            yield document


def require_documents(corpus: CorpusConfig, counts: Counter[str]) -> None:
    """Raise `ConfigError` if no record became a document; an empty store is never intended."""
    if not counts["documents"]:
        remedy = "check corpus.paths, corpus.where and corpus.text_field"
        if counts[UNSCORED]:
            remedy = "every conversation was cut before a token that the loss counts; raise max_tokens"
        raise ConfigError(
            "corpus.name",
            corpus.name,
            f"the corpus is empty, no record became a document ({in_words(counts)}); {remedy}",
        )


def in_words(counts: Counter[str]) -> str:
    """Format counts as `2 bad records, 17 documents`."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items())) or "no records"


def lookup(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; a dot descends into a nested record. `BadRecord` if it is missing."""
    # A name with a dot in it takes precedence over a path: columns of parquet files are often named so.
    value: Any = fields.get(name, _MISSING)
    if value is _MISSING:
        value = fields
        for part in name.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    if value is _MISSING:
        raise BadRecord(f"no field {name!r}, the record has {', '.join(map(repr, fields)) or 'none'}")
    return value


def hash64(content: bytes) -> int:
    """Return the first 8 bytes of blake2b as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _document(
    raw: Raw, fields: Mapping[str, Any], corpus: CorpusConfig, keep: Sequence[str], below: float, content_of: ContentOf
) -> Document | None:
    if any(_as_str(_field(fields, name, corpus)) != value for name, value in corpus.where.items()):
        return None
    content = content_of(fields, corpus)
    # The text's hash is stored even if another field decides the split: it identifies equal texts across stores.
    value = text_hash = hash64(content)
    if corpus.split_field:
        value = hash64(_encode(_as_str(_field(fields, corpus.split_field, corpus))))
    split = "validation" if value < below else "train"
    kept = {name: fields[name] for name in keep if name in fields}
    return Document(content, kept, text_hash, split, raw.number, raw.consumed)


def _field(fields: Mapping[str, Any], name: str, corpus: CorpusConfig) -> Any:
    try:
        return lookup(fields, name)
    except BadRecord as error:
        raise BadRecord(str(error), remedy(key_of(corpus, name), fields)) from error


def _as_str(value: Any) -> str:
    return decode(value.content) if isinstance(value, Utf8) else str(value)


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"character {error.start + 1} of the text is half of a surrogate pair, not Unicode") from error


def refuse(where: str, error: BadRecord, corpus: CorpusConfig, counts: Counter[str]) -> None:
    """Raise `ConfigError` for a bad record, or log and count it, by `on_bad_record`."""
    if corpus.on_bad_record is OnBadRecord.error:
        others = "leave such records out with corpus.on_bad_record=skip"
        raise ConfigError(where, None, f"{error}; {error.remedy}, or {others}") from error
    # Count before logging: the limit of log lines must not limit the count in the manifest.
    counts["bad_records"] += 1
    if counts["bad_records"] <= MAX_WARNINGS:
        logger.warning("left out: %s: %s", where, error)
