"""A token store of texts with a copy of its tokenizer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clex_train.token_store.manifest import MANIFEST
from clex_train.token_store.vocabulary import vocabulary_sha256
from clex_train.token_store.writer import write_store


def write_text_store(path: Path, texts: list[str], tokenizer: Any) -> None:
    """Write the same documents to both splits."""
    documents = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    splits = {"train": documents, "validation": documents}
    manifest = write_store(path, splits, len(tokenizer), tokenizer.eos_token_id)
    known = replace(manifest.tokenizer, vocabulary_sha256=vocabulary_sha256(tokenizer.get_vocab()))
    (path / MANIFEST).write_text(replace(manifest, tokenizer=known).to_json(), encoding="utf-8")
    tokenizer.save_pretrained(path / "tokenizer")
