"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[1]

# Shapes are types in the mathematics; they are checked here and cost nothing in a run.
install_import_hook(["clex_train.scaling", "clex_train.rope", "clex_train.attention"], "typechecking.check")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Outputs of the original CLEX and LM-Infinite codes on small random models (see its README)."""
    for folder in (ROOT / "tests" / "goldens", ROOT.parent / "shared" / "goldens"):
        if (folder / "clex_ode.safetensors").exists():
            return folder
    pytest.skip("no goldens: neither tests/goldens nor ../shared/goldens is there")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real long text in RedPajama's layout, beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.exists():
        pytest.skip("no real text: ../shared/data is not there")
    return folder
