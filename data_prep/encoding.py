"""The tokenizer of a store: loaded through transformers, described, and copied into the store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from clex_train.data.manifest import TokenizerInfo
from clex_train.data.vocabulary import vocabulary_sha256
from clex_train.faults import first_line


def load_tokenizer(name: str) -> Any:
    """The fast tokenizer of a directory or hub repository.

    Raises:
        ValueError: there is none, it has no fast version, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or ImportError, as the files have it
        raise ValueError(
            f"tokenizer={name}: {_reason(name, error)}; name a directory or hub repository with a tokenizer "
            "(`python -m data_prep train_tokenizer` makes one)"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={name}: it has no fast version (tokenizer.json); convert it with transformers")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={name}: it has no EOS token, which ends every document; set eos_token and save it")
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> TokenizerInfo:
    """Write the tokenizer's files to `directory` and describe them."""
    tokenizer.save_pretrained(directory)
    vocabulary = tokenizer.get_vocab()
    return TokenizerInfo(
        vocab_size=max(vocabulary.values()) + 1,
        vocabulary_sha256=vocabulary_sha256(vocabulary),
        eos_token=str(tokenizer.eos_token),
        eos_id=int(tokenizer.eos_token_id),
        bos_token=None if tokenizer.bos_token is None else str(tokenizer.bos_token),
        bos_id=tokenizer.bos_token_id,
        files={file.name: _sha256(file) for file in sorted(directory.iterdir()) if file.is_file()},
    )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _reason(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return f"no usable tokenizer in this directory ({type(error).__name__}: {first_line(error)})"
    return "no such directory, and no such repository could be reached on the hub"
