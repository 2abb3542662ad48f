"""BOS at the beginning of documents, evaluation windows and prompts.

`auto` is what the tokenizer does by itself: Llama's and Gemma's put BOS in front of every text, Qwen's and GPT-2's do
not. Models trained with it rely on it: Gemma is near random without (lm-evaluation-harness #1465).
"""

from __future__ import annotations

from clex_train.config.bos import Bos
from clex_train.data.store import TokenStore
from clex_train.utils import log
from clex_train.utils.bounds import require
from clex_train.utils.errors import ConfigError
from clex_train.utils.protocols import Tokenizer

logger = log.get(__name__)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Tell whether a tokenizer of transformers begins a text with its BOS by itself."""
    bos_id = tokenizer.bos_token_id
    return bos_id is not None and list(tokenizer("x")["input_ids"])[:1] == [bos_id]


def resolve(choice: Bos, tokenizer: Tokenizer, key: str) -> bool:
    """Decide whether documents begin with BOS.

    Raises:
        ValueError: `always`, of a tokenizer without a BOS token.
    """
    if choice is Bos.always and tokenizer.bos_token_id is None:
        raise ConfigError(
            key, "always", f"the tokenizer has no BOS token; set bos_token and save it, or say {key}=never"
        )
    return adds_bos(tokenizer) if choice is Bos.auto else choice is Bos.always


def evaluation_bos_id(
    choice: Bos, store: TokenStore, tokenizer: Tokenizer | None = None, key: str = "evaluation.bos"
) -> int | None:
    """Choose the id that windows and prompts begin with, None for none.

    `auto` follows the store. One without a record of BOS has documents without it, and so had the training on it:
    a run that is resumed under a newer version keeps its evaluations comparable.

    Args:
        tokenizer: of transformers, for a model that was not trained on the store: `auto` follows it where the store
            has no record.

    Raises:
        ValueError: `always`, of a tokenizer without a BOS token.
    """
    bos_id = store.manifest.tokenizer.bos_id
    if choice is Bos.never:
        return None
    if choice is Bos.always:
        remedy = f"the tokenizer of {store.path} has no BOS token; say {key}=never, or tokenise again with one"
        require(bos_id is not None, key, choice.value, remedy)
        return bos_id
    is_free = store.manifest.bos is None and bos_id is not None
    has_bos = adds_bos(tokenizer) if is_free and tokenizer is not None else store.bos
    return bos_id if has_bos else None


def warn_if_bos_differs(store: TokenStore, bos_id: int | None, key: str = "evaluation.bos") -> None:
    """Warn if windows begin with BOS and the documents of a store do not, or the other way round."""
    from clex_train.utils import distributed  # here: a program that only tokenises needs no torch

    if store.bos == (bos_id is not None) or not distributed.is_main():
        return
    logger.warning(
        "evaluation begins windows and prompts %s BOS, the documents of %s have %s; %s=%s makes them alike",
        "without" if bos_id is None else "with",
        store.path,
        describe_bos(store),
        key,
        Bos.always.value if store.bos else Bos.never.value,
    )


def describe_bos(store: TokenStore) -> str:
    """Describe in words what the documents of a store begin with."""
    info = store.manifest.tokenizer
    if store.manifest.bos is None:
        return "no BOS" if info.bos_id is None else "no BOS (the store was written before it could have one)"
    if info.adds_bos == store.bos:
        return f"{'a' if store.bos else 'no'} BOS, as the tokenizer does"
    return "BOS, though the tokenizer puts none" if store.bos else "no BOS, though the tokenizer puts one"
