"""Does a tokenizer give the ids that a store was written with? Compared by a hash of the vocabulary, token by token.

The vocabulary (every token and its id, added tokens included) is what the meaning of stored ids depends on. The text of
tokenizer.json is not compared: saving a tokenizer again may reorder or extend it without moving an id.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from clex_train.data.store import TokenStore
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.protocols import Tokenizer
from clex_train.utils.records import convert, read_json

LARGEST = 2**28
"""Bytes of a tokenizer.json that are read at most; those of 250,000 tokens have some thirty million."""
SPAN = 1 << 24
"""Tokens that are looked through at a time."""


@runtime_checkable
class HasVocabulary(Protocol):
    """What is needed of a tokenizer; those of transformers and of tokenizers have it."""

    def get_vocab(self) -> dict[str, int]: ...


def check_tokenizer(store: TokenStore, tokenizer: str | Path | HasVocabulary) -> None:
    """Make sure that a tokenizer is the one the store was written with.

    Args:
        store: the token store.
        tokenizer: a tokenizer object, or a directory with a `tokenizer.json`.

    Raises:
        ValueError: the vocabularies differ (the first token that does is named), or the directory has no vocabulary.
    """
    given = vocabulary(tokenizer)
    if vocabulary_sha256(given) == store.manifest.tokenizer.vocabulary_sha256:
        return
    name = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", "this tokenizer")
    difference = _first_difference(vocabulary(store.tokenizer_path), given)
    raise ConfigError(
        "data.path",
        store.path,
        f"tokenised with another tokenizer than {name} ({difference}); take a store made "
        f"by the model's own tokenizer, or tokenise again with tokenizer={name}",
    )


def check_embedding(store: TokenStore, num_rows: int, model: str, key: str = "data.path") -> None:
    """Make sure that an embedding of `num_rows` rows has one for every id of a store.

    A tokenizer may have more ids than the embedding (a padding token that was added) as long as no document has them,
    so tokens are read, up to the first that is beyond, only where it has, and only on rank 0.

    Raises:
        ValueError: naming `key`, the store and the id, before a device-side assert would.
    """
    from clex_train.utils import distributed  # here: a program that only tokenises needs no torch

    info = store.manifest.tokenizer
    if info.vocab_size <= num_rows:
        return
    for name, index in (("EOS", info.eos_id), ("BOS", info.bos_id if store.bos else None)):
        if index is not None and index >= num_rows:
            raise _beyond(key, store, f"its {name} is {index}", num_rows, model)
    if not distributed.is_main():
        # A refusal on rank 0 has the launcher end the others; a billion tokens need not be read by each of them.
        return
    for start in range(0, store.num_tokens, SPAN):
        largest = int(store.tokens(start, min(start + SPAN, store.num_tokens)).max())
        if largest >= num_rows:
            raise _beyond(key, store, f"it has the id {largest}", num_rows, model)


def check_bos(bos_id: int | None, num_rows: int, model: str, key: str = "evaluation.bos") -> None:
    """Make sure that an embedding has a row for what windows and prompts begin with; `ValueError` names `key`."""
    if bos_id is not None and bos_id >= num_rows:
        raise ConfigError(
            key,
            None,
            f"BOS is {bos_id}, and the embedding of {model} has {num_rows} rows (vocab_size); say {key}=never",
        )


def check_ids(tokenizer: Tokenizer, num_rows: int, model: str) -> None:
    """Make sure that an embedding has a row for what a tokenizer makes of any text; `ValueError` names the id."""
    ids = {"EOS": tokenizer.eos_token_id, "BOS": tokenizer.bos_token_id, "last id": tokenizer.vocab_size - 1}
    for name, index in ids.items():
        if index is not None and index >= num_rows:
            raise ConfigError(
                "model.path",
                model,
                f"its tokenizer's {name} is {index}, and its embedding has {num_rows} rows "
                "(vocab_size); give the tokenizer that it was trained with",
            )


def vocabulary_sha256(vocabulary: dict[str, int]) -> str:
    """sha256 over all (id, token) in ascending order."""
    pairs = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def vocabulary(tokenizer: str | Path | HasVocabulary) -> dict[str, int]:
    """Every token, added ones included, and its id.

    Raises:
        ValueError: the directory has no readable `tokenizer.json`.
    """
    if isinstance(tokenizer, HasVocabulary):
        return dict(tokenizer.get_vocab())
    path = Path(tokenizer) / "tokenizer.json"
    if not path.exists():
        raise ConfigError(
            "tokenizer", tokenizer, "no tokenizer.json there; save the fast tokenizer of transformers into a directory"
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
        f"{what}, and the embedding of {model} has {num_rows} rows (vocab_size); take a store "
        "made by the model's own tokenizer",
    )


def _model_vocabulary(model: dict[str, Any]) -> dict[str, int]:
    entries = model["vocab"]
    if isinstance(entries, dict):
        return convert(entries, dict[str, int])
    pairs = convert(entries, list[tuple[str, float]])  # of Unigram: (token, score)
    return {token: index for index, (token, _) in enumerate(pairs)}


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    ours_by_id, theirs_by_id = ({i: t for t, i in v.items()} for v in (ours, theirs))
    for index in sorted(ours_by_id.keys() | theirs_by_id.keys()):
        mine, other = ours_by_id.get(index), theirs_by_id.get(index)
        if mine != other:
            return f"{len(ours)} and {len(theirs)} tokens; id {index} is {mine!r} in the store and {other!r} there"
    return "the store's own tokenizer directory was changed after the store was written"
