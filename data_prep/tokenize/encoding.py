"""Tokenizer of a store: load it with transformers, describe it, and copy it into the store."""

from __future__ import annotations

from pathlib import Path

from clex_train.data.bos import adds_bos
from clex_train.token_store.manifest import TokenizerInfo
from clex_train.token_store.vocabulary import vocabulary_sha256
from clex_train.utils.errors import ConfigError, first_line
from clex_train.utils.files import is_lfs_pointer, sha256
from clex_train.utils.protocols import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files from which transformers can build a tokenizer."""
_REMEDY = "name a directory or hub repository with a tokenizer (`python -m data_prep train_tokenizer` makes one)"


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Tokenizer:
    """Load the fast tokenizer of a directory or hub repository.

    Python code that comes with it runs only if `trust_remote_code` is set; there is no prompt on the terminal.

    Raises:
        ConfigError: there is no tokenizer, it has no fast version, it needs Python code, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    directory = Path(name)
    # transformers would look up a mistyped path on the hub and report a network error.
    if not directory.is_dir() and (directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConfigError("tokenizer", name, f"no such directory; {_REMEDY}")
    if reason := _obstacle(directory):
        raise ConfigError("tokenizer", name, reason)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or ImportError, depending on files
        if "trust_remote_code" in str(error):
            raise ConfigError(
                "tokenizer",
                name,
                "it comes with Python code, which does not run unless you allow it; "
                "read it, then set tokenizer.trust_remote_code=true",
            ) from error
        raise ConfigError("tokenizer", name, f"{_reason(directory, error)}; {_REMEDY}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("tokenizer", name, "it has no fast version (tokenizer.json); convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "tokenizer", name, "it has no EOS token, which ends every document; set eos_token and save it"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> TokenizerInfo:
    """Write the tokenizer's files to `directory` and describe the tokenizer."""
    # Saved, not copied: a hub tokenizer has no directory, and the store must not depend on the hub cache.
    tokenizer.save_pretrained(directory)
    vocabulary = tokenizer.get_vocab()
    assert tokenizer.eos_token_id is not None, "load_tokenizer refuses a tokenizer without EOS"
    return TokenizerInfo(
        # Not len(vocabulary): ids may have gaps, and the dtype must fit the largest one.
        vocab_size=max(vocabulary.values()) + 1,
        vocabulary_sha256=vocabulary_sha256(vocabulary),
        adds_bos=adds_bos(tokenizer),
        eos_token=str(tokenizer.eos_token),
        eos_id=tokenizer.eos_token_id,
        bos_token=None if tokenizer.bos_token is None else str(tokenizer.bos_token),
        bos_id=tokenizer.bos_token_id,
        files={file.name: sha256(file) for file in sorted(directory.iterdir()) if file.is_file()},
    )


def _obstacle(directory: Path) -> str:
    """Return the reason why a directory has no loadable tokenizer, judged by its files; else an empty string."""
    if not directory.is_dir():
        return ""
    files = sorted(file.name for file in directory.iterdir() if file.is_file())
    found = [name for name in files if name in TOKENIZER_FILES or _is_custom_tokenizer(name)]
    if not found:
        has = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        return f"no tokenizer in this directory (no tokenizer.json; it has {has or 'no files'}); {_REMEDY}"
    pointers = [name for name in found if is_lfs_pointer(directory / name)]
    return f"{pointers[0]} is a git-lfs pointer instead of the file; run `git lfs pull`" if pointers else ""


def _is_custom_tokenizer(name: str) -> bool:
    return name.endswith(".tiktoken") or name.startswith("tokenization_")


def _reason(directory: Path, error: Exception) -> str:
    if not directory.is_dir():
        return "no such directory, and no such repository could be reached on the hub"
    if (directory / "tokenizer.json").is_file():
        return f"no usable tokenizer in this directory ({type(error).__name__}: {first_line(error)})"
    return (
        "no usable tokenizer in this directory: it has no tokenizer.json, and its other files could not be converted "
        "(pip install sentencepiece tiktoken protobuf may be missing)"
    )
