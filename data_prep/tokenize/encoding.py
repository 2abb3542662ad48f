"""The tokenizer of a store: loaded through transformers, described, and copied into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clex_train.data.bos import adds_bos
from clex_train.data.manifest import TokenizerInfo
from clex_train.data.vocabulary import vocabulary_sha256
from clex_train.utils.errors import first_line
from clex_train.utils.files import is_lfs_pointer, sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""Files of which transformers can make a tokenizer."""
_REMEDY = "name a directory or hub repository with a tokenizer (`python -m data_prep train_tokenizer` makes one)"


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer of a directory or hub repository.

    Python code that comes with it is run only where `trust_remote_code` says so; nobody is asked on the terminal.

    Raises:
        ValueError: there is none, it has no fast version, it has code of its own, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    directory = Path(name)
    if not directory.is_dir() and (directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ValueError(f"tokenizer={name}: no such directory; {_REMEDY}")
    if reason := _obstacle(directory):
        raise ValueError(f"tokenizer={name}: {reason}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError or ImportError, as the files have it
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"tokenizer={name}: it comes with Python code of its own, which is not run unless you allow "
                "it; read it, then say tokenizer.trust_remote_code=true"
            ) from error
        raise ValueError(f"tokenizer={name}: {_reason(directory, error)}; {_REMEDY}") from error
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
        adds_bos=adds_bos(tokenizer),
        eos_token=str(tokenizer.eos_token),
        eos_id=int(tokenizer.eos_token_id),
        bos_token=None if tokenizer.bos_token is None else str(tokenizer.bos_token),
        bos_id=tokenizer.bos_token_id,
        files={file.name: sha256(file) for file in sorted(directory.iterdir()) if file.is_file()},
    )


def _obstacle(directory: Path) -> str:
    """Say why a directory has no tokenizer that could be loaded, as far as its files say so; "" if nothing is found."""
    if not directory.is_dir():
        return ""
    files = sorted(file.name for file in directory.iterdir() if file.is_file())
    found = [name for name in files if name in TOKENIZER_FILES or _is_of_a_kind_of_its_own(name)]
    if not found:
        has = ", ".join(files[:5]) + (", ..." if len(files) > 5 else "")
        return f"no tokenizer in this directory (no tokenizer.json; it has {has or 'no files'}); {_REMEDY}"
    pointers = [name for name in found if is_lfs_pointer(directory / name)]
    return f"{pointers[0]} is a git-lfs pointer and not the file itself; fetch it by `git lfs pull`" if pointers else ""


def _is_of_a_kind_of_its_own(name: str) -> bool:
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
