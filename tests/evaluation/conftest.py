"""Settings for this folder's tests."""

from collections.abc import Iterator

import pytest
import torch
from evaluation_models import VOCAB
from model_directories import save_model, save_store

from clex_train.data.writer import write_store


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The models are so small that handing work to threads costs more than the work, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model directory, a token store, and a store of another vocabulary."""
    root = tmp_path_factory.mktemp("evaluate")
    save_model(root / "base")
    save_store(root / "store")
    save_store(root / "other", VOCAB - 1)
    write_store(root / "train_only", {"train": [[2, 3]], "validation": []}, VOCAB)
    return {"model": str(root / "base"), "root": str(root)} | {
        name: str(root / name) for name in ("store", "other", "train_only")
    }
