"""Check that a tokenizer gives the ids that a store was written with, by a hash of its vocabulary.

The vocabulary (every token and its id, added tokens included) is what gives stored ids their meaning. The text of
tokenizer.json is not compared: saving a tokenizer again may reorder or extend the file without changing an id.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clex_train.token_store.store import TokenStore
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.records import convert, read_json

LARGEST = 2**28
"""Largest tokenizer.json to read, in bytes; one of 250,000 tokens has about 30 million."""
SPAN = 1 << 24
"""Tokens to scan at a time."""


@runtime_checkable
class HasVocabulary(Protocol):
    """Part of a tokenizer that is needed here; those of transformers and of tokenizers have it."""

    def get_vocab(self) -> dict[str, int]: ...


def check_tokenizer(store: TokenStore, tokenizer: str | Path | HasVocabulary) -> None:
    """Check that a tokenizer is the one that the store was written with.

    Args:
        store: the token store.
        tokenizer: a tokenizer object, or a directory with a `tokenizer.json`.

    Raises:
        ConfigError: the vocabularies differ (names the first difference), or the directory has no vocabulary.
    """
    given = vocabulary(tokenizer)
    if vocabulary_sha256(given) == store.manifest.tokenizer.vocabulary_sha256:
        return
    name = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", "this tokenizer")
    difference = _first_difference(vocabulary(store.tokenizer_path), given)
    raise ConfigError(
        "data.path",
        store.path,
        f"tokenized with another tokenizer than {name} ({difference}); use a store made "
        f"by the model's own tokenizer, or tokenize again with tokenizer={name}",
    )


def check_embedding(store: TokenStore, num_rows: int, model: str, key: str = "data.path") -> None:
    """Check that an embedding of `num_rows` rows covers every id of a store.

    Raises:
        ConfigError: names `key`, the store and the id, where CUDA would fail with a device-side assert.
    """
    from clex_train.utils import distributed  # imported late: tokenizing alone needs no torch

    info = store.manifest.tokenizer
    if info.vocab_size <= num_rows:
        return
    for name, index in (("EOS", info.eos_id), ("BOS", info.bos_id if store.bos else None)):
        if index is not None and index >= num_rows:
            raise _beyond(key, store, f"its {name} is {index}", num_rows, model)
    if not distributed.is_main():
        # Scanning takes minutes for 10^9 tokens, so one rank does it; if it raises, the launcher ends the others.
        return
    # A tokenizer may have more ids than the embedding (an added padding token) as long as no document uses them, so
    # the tokens decide, up to the first id that is too large.
    for start in range(0, store.num_tokens, SPAN):
        largest = int(store.tokens(start, min(start + SPAN, store.num_tokens)).max())
        if largest >= num_rows:
            raise _beyond(key, store, f"it has the id {largest}", num_rows, model)


def check_bos(bos_id: int | None, num_rows: int, model: str, key: str = "evaluation.bos") -> None:
    """Check that an embedding has a row for the BOS id of windows and prompts; `ConfigError` names `key`."""
    if bos_id is not None and bos_id >= num_rows:
        raise ConfigError(
            key,
            None,
            f"BOS is {bos_id}, but the embedding of {model} has {num_rows} rows (vocab_size); set {key}=never",
        )


def check_ids(tokenizer: Tokenizer, num_rows: int, model: str) -> None:
    """Check that an embedding has a row for every id that a tokenizer produces; `ConfigError` names the id."""
    # `vocab_size` leaves added tokens out, so an unused padding token beyond the embedding is accepted.
    ids = {"EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id, "last id": tokenizer.vocab_size - 1}
    for name, index in ids.items():
        if index is not None and index >= num_rows:
            raise ConfigError(
                "model.path",
                model,
                f"its tokenizer's {name} is {index}, but its embedding has {num_rows} rows "
                "(vocab_size); use the tokenizer that it was trained with",
            )


def vocabulary_sha256(vocabulary: dict[str, int]) -> str:
    """Hash all (id, token) pairs in ascending order with sha256."""
    pairs = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def vocabulary(tokenizer: str | Path | HasVocabulary) -> dict[str, int]:
    """Return every token, added ones included, and its id.

    Raises:
        ConfigError: the directory has no readable `tokenizer.json`.
    """
    if isinstance(tokenizer, HasVocabulary):
        return dict(tokenizer.get_vocab())
    path = Path(tokenizer) / "tokenizer.json"
    if not path.exists():
        raise ConfigError(
            "tokenizer", tokenizer, "no tokenizer.json there; save the fast transformers tokenizer into a directory"
        )
    try:
        content = read_json(path, most=LARGEST)
        return _model_vocabulary(content["model"]) | {t["content"]: t["id"] for t in content.get("added_tokens") or []}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(path, None, f"not a tokenizer file ({first_line(error)}); copy it again") from error


def _beyond(key: str, store: TokenStore, what: str, num_rows: int, model: str) -> ConfigError:
    return ConfigError(
        key,
        store.path,
        f"{what}, but the embedding of {model} has {num_rows} rows (vocab_size); use a store "
        "made by the model's own tokenizer",
    )


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    entries = model["vocab"]
    # BPE, WordPiece and WordLevel keep a dict of token to id.
    if isinstance(entries, dict):
        return convert(entries, dict[str, int])
    pairs = convert(entries, list[tuple[str, float]])  # Unigram keeps (token, score) pairs; the position is the id
    return {token: index for index, (token, _) in enumerate(pairs)}


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    ours_by_id, theirs_by_id = ({i: t for t, i in v.items()} for v in (ours, theirs))
    for index in sorted(ours_by_id.keys() | theirs_by_id.keys()):
        mine, other = ours_by_id.get(index), theirs_by_id.get(index)
        if mine != other:
            return f"{len(ours)} and {len(theirs)} tokens; id {index} is {mine!r} in the store and {other!r} there"
    return "the store's own tokenizer directory was modified after the store was written"
