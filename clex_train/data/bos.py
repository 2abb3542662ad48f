"""Beginning-of-sequence (BOS) token of documents, evaluation windows and prompts.

`auto` follows the tokenizer: those of Llama and Gemma prepend BOS to every text, those of Qwen and GPT-2 do not.
A model trained with BOS needs it: Gemma scores near random without (lm-evaluation-harness #1465).
"""

from __future__ import annotations

from clex_train.config.bos import Bos
from clex_train.token_store.store import TokenStore
from clex_train.utils import log
from clex_train.utils.errors import ConfigError, require
from clex_train.utils.protocols import Tokenizer

logger = log.get(__name__)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return True if a transformers tokenizer prepends BOS by default."""
    bos_id = tokenizer.bos_token_id
    # Encode an example: `add_bos_token` is missing on many fast tokenizers, whose post-processor decides.
    return bos_id is not None and list(tokenizer("x")["input_ids"])[:1] == [bos_id]


def resolve(choice: Bos, tokenizer: Tokenizer, key: str) -> bool:
    """Decide whether documents begin with BOS.

    Raises:
        ConfigError: the choice is `always`, and the tokenizer has no BOS token.
    """
    if choice is Bos.always and tokenizer.bos_token_id is None:
        raise ConfigError(
            key, "always", f"the tokenizer has no BOS token; set bos_token and save it, or set {key}=never"
        )
    return adds_bos(tokenizer) if choice is Bos.auto else choice is Bos.always


def evaluation_bos_id(
    choice: Bos, store: TokenStore, tokenizer: Tokenizer | None = None, key: str = "evaluation.bos"
) -> int | None:
    """Return the BOS id for windows and prompts, or None to begin without BOS.

    Args:
        choice: `auto` follows the store, and the tokenizer if the store has no record of BOS.
        store: the store that windows are cut from.
        tokenizer: a transformers tokenizer; pass it only for a model that was not trained on the store.
        key: config key that error messages name.

    Raises:
        ConfigError: the choice is `always`, and the tokenizer has no BOS token.
    """
    bos_id = store.manifest.tokenizer.bos_id
    if choice is Bos.never:
        return None
    if choice is Bos.always:
        remedy = f"the tokenizer of {store.path} has no BOS token; set {key}=never, or tokenize again with one"
        require(bos_id is not None, key, choice.value, remedy)
        return bos_id
    # A store without a record of BOS holds documents without it, and the run trained on them that way. Following the
    # store keeps evaluations comparable when such a run resumes under a newer version.
    is_free = store.manifest.bos is None and bos_id is not None
    has_bos = adds_bos(tokenizer) if is_free and tokenizer is not None else store.bos
    return bos_id if has_bos else None


def warn_if_bos_differs(store: TokenStore, bos_id: int | None, key: str = "evaluation.bos") -> None:
    """Log a warning if windows begin with BOS and the documents of the store do not, or vice versa."""
    from clex_train.utils import distributed  # imported late: tokenizing alone needs no torch

    if store.bos == (bos_id is not None) or not distributed.is_main():
        return
    logger.warning(
        "evaluation begins windows and prompts %s BOS, but the documents of %s have %s; set %s=%s to match them",
        "without" if bos_id is None else "with",
        store.path,
        describe_bos(store),
        key,
        Bos.always.value if store.bos else Bos.never.value,
    )


def describe_bos(store: TokenStore) -> str:
    """Describe the beginning of the documents of a store, as a phrase that follows "documents have"."""
    info = store.manifest.tokenizer
    if store.manifest.bos is None:
        return "no BOS" if info.bos_id is None else "no BOS (the store predates the BOS option)"
    if info.adds_bos == store.bos:
        return f"{'a' if store.bos else 'no'} BOS, as the tokenizer does"
    return "BOS, although the tokenizer adds none" if store.bos else "no BOS, although the tokenizer adds one"
