"""What is read: the token store and how rows are cut from it."""

from __future__ import annotations

from dataclasses import dataclass

from clex_train.settings.bounds import require


@dataclass
class DataConfig:
    path: str | None = None
    """Directory of a tokenised store, as written by `python -m data_prep tokenize`."""
    seq_len: int = 4096
    """Tokens in a training row. Rows of any length are cut from one store without tokenising again."""
    document_mask: bool = False
    """Keep the documents of a row apart: no attention across them, positions (CLEX's too) from 0 in each."""

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "at least 2 tokens, one to read and one to predict")
