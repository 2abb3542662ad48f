"""Small cells of prompts for the retrieval tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clex_train.config.retrieval import Task
from clex_train.retrieval.haystack import Documents
from clex_train.retrieval.plan import Cell
from clex_train.retrieval.tasks import TASKS
from clex_train.token_store.store import TokenStore
from tests.retrieval.text_stores import write_text_store


def make_cells(
    tokenizer: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    depths: Sequence[float],
    num_prompts: int,
    seed: int = 0,
    documents: Documents | None = None,
) -> list[Cell]:
    """Make all cells, task by task."""
    return [
        Cell(task, n, tuple(depths) if TASKS[task].has_depth else (None,), num_prompts, seed, tokenizer, documents)
        for task in tasks
        for n in lengths
    ]


def documents_of(texts: list[str], tokenizer: Any, folder: Path) -> Documents:
    """Write texts to a store and read them back as real text for prompts."""
    write_text_store(folder, texts, tokenizer)
    return Documents(TokenStore(folder).split("validation"), tokenizer)
