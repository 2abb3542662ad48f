"""BOS at the beginning of documents, evaluation windows and prompts.

`auto` is what the tokenizer does by itself: Llama's and Gemma's put BOS in front of every text, Qwen's and GPT-2's do
not. Models trained with it rely on it: Gemma is near random without (lm-evaluation-harness #1465).
"""

from __future__ import annotations

from typing import Any

from clex_train import distributed, log
from clex_train.data.store import TokenStore
from clex_train.settings.bos import Bos

logger = log.get(__name__)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer of transformers begins a text with its BOS by itself."""
    bos_id = tokenizer.bos_token_id
    return bos_id is not None and list(tokenizer("x")["input_ids"])[:1] == [bos_id]


def resolve(choice: Bos, tokenizer: Any, key: str) -> bool:
    """Whether documents begin with BOS.

    Raises:
        ValueError: `always`, of a tokenizer without a BOS token.
    """
    if choice is Bos.always and tokenizer.bos_token_id is None:
        raise ValueError(f"{key}=always: the tokenizer has no BOS token; set bos_token and save it, or say {key}=never")
    return adds_bos(tokenizer) if choice is Bos.auto else choice is Bos.always


def of_evaluation(choice: Bos, store: TokenStore, tokenizer: Any, key: str = "evaluation.bos") -> int | None:
    """The id that windows and prompts begin with, None for none.

    `auto` follows the store, whose documents a model was trained on or is compared by; a store that was written before
    it had a record of BOS follows the tokenizer.

    Args:
        tokenizer: of transformers; looked at only if the store has no record.

    Raises:
        ValueError: `always`, of a tokenizer without a BOS token.
    """
    info = store.manifest.tokenizer
    if choice is Bos.auto and (store.manifest.bos is not None or info.bos_id is None):
        return info.bos_id if store.bos else None
    if choice is not Bos.never and info.bos_id is None:
        raise ValueError(
            f"{key}=always: the tokenizer of {store.path} has no BOS token; say {key}=never, or tokenise again with one"
        )
    return info.bos_id if choice is Bos.always or (choice is Bos.auto and adds_bos(tokenizer)) else None


def warn_of_others(store: TokenStore, bos_id: int | None, key: str = "evaluation.bos") -> None:
    """Say so if windows begin with BOS and the documents of a store do not, or the other way round."""
    if store.bos == (bos_id is not None) or not distributed.is_main():
        return
    logger.warning(
        "evaluation begins windows and prompts %s BOS, the documents of %s have %s; %s=%s makes them alike",
        "without" if bos_id is None else "with",
        store.path,
        in_words(store),
        key,
        Bos.always.value if store.bos else Bos.never.value,
    )


def in_words(store: TokenStore) -> str:
    """What the documents of a store begin with, for a line of output."""
    info = store.manifest.tokenizer
    if store.manifest.bos is None:
        return "no BOS" if info.bos_id is None else "no BOS (the store was written before it could have one)"
    if info.adds_bos == store.bos:
        return f"BOS as the tokenizer does: {'yes' if store.bos else 'no'}"
    return "BOS, though the tokenizer puts none" if store.bos else "no BOS, though the tokenizer puts one"
