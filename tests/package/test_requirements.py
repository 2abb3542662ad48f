"""Dependencies of the package: read by the build from the files for `pip install -r`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """Import the build hooks, which are not part of the package."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_file_of_requirements_is_the_package_or_one_extra(hooks: ModuleType) -> None:
    files = {path.name for path in ROOT.glob("requirements*.txt")}
    assert files == {"requirements.txt", *(name for names in hooks.EXTRAS.values() for name in names)}


@pytest.mark.parametrize("file", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_every_line_is_a_requirement_with_bounds(hooks: ModuleType, file: str) -> None:
    found = [Requirement(line) for line in hooks.requirements(ROOT / file)]
    assert found
    assert all(requirement.specifier for requirement in found)


def test_a_build_outside_of_git_records_no_commit_or_that_of_its_archive(hooks: ModuleType, tmp_path: Path) -> None:
    assert hooks.commit(tmp_path) == ""
    (tmp_path / "COMMIT").write_text("abc\n")
    assert hooks.commit(tmp_path) == "abc"
