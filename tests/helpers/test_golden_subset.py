"""The goldens in the repository: present, small, and equal to the complete set."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import golden_subset
from tests.helpers.golden_subset import SUBSET

FILES = (*golden_subset.WHOLE, "clex_llama.weights.safetensors", "clex_eval_tanh.safetensors")
MOST_BYTES = 3_000_000


def test_a_clone_has_the_goldens() -> None:
    """Require the goldens, without which the comparisons with the original code would be skipped."""
    for name in (*FILES, "clex_llama.config.json", "README.md"):
        assert (SUBSET / name).is_file(), f"tests/goldens/{name} is missing: git checkout tests/goldens"
    assert sum(file.stat().st_size for file in SUBSET.iterdir()) < MOST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_the_goldens_equal_those_of_the_complete_set(name: str, complete_goldens: Path, tmp_path: Path) -> None:
    golden_subset.main(complete_goldens, tmp_path)
    again, committed = load_file(tmp_path / name), load_file(SUBSET / name)
    assert again.keys() == committed.keys()
    assert all(torch.equal(tensor, committed[key]) for key, tensor in again.items())
