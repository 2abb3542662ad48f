"""Fixtures of the evaluation tests."""

import pytest

from clex_train.token_store.writer import write_store
from tests.evaluation.evaluation_models import VOCAB
from tests.evaluation.model_directories import save_model, save_store


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write a model directory, a token store, and a store of another vocabulary."""
    root = tmp_path_factory.mktemp("evaluate")
    save_model(root / "base")
    save_store(root / "store")
    save_store(root / "other", VOCAB - 1)
    write_store(root / "train_only", {"train": [[2, 3]], "validation": []}, VOCAB)
    return {"model": str(root / "base"), "root": str(root)} | {
        name: str(root / name) for name in ("store", "other", "train_only")
    }
