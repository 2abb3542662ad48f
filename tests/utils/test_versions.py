"""Consistency of pinned versions, tested versions and the bounds of requirements.txt."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from clex_train.console import program
from clex_train.utils import versions

ROOT = Path(__file__).resolve().parents[2]


def pinned(name: str) -> dict[str, str]:
    """Parse {package: version} from a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(re.split("==", line) for line in lines if line and not line.startswith("#"))


def required(name: str = "requirements.txt") -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_constraints_are_exact_versions_of_public_releases(file: str) -> None:
    for name, version in pinned(file).items():
        assert Version(version).local is None, f"{name}: a build label or a link pins one registry"


@pytest.mark.parametrize(
    "file", ["requirements.txt", "requirements-dev.txt", "requirements-docs.txt", "requirements-export.txt"]
)
def test_the_newest_versions_are_pinned_for_every_requirement(file: str) -> None:
    newest = {normal(name): version for name, version in pinned("constraints.txt").items()}
    for requirement in required(file):
        assert requirement.specifier.contains(newest[normal(requirement.name)]), requirement


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    oldest = {normal(name): Version(version) for name, version in pinned("constraints-oldest.txt").items()}
    bounds = {
        normal(r.name): Version(each.version)
        for r in required()
        for each in r.specifier
        if each.operator in (">=", "==")
    }
    assert oldest == bounds


def test_tested_versions_are_the_pinned_ones() -> None:
    newest = pinned("constraints.txt")
    assert {name: newest[name] for name in versions.NEWEST_TESTED} == versions.NEWEST_TESTED


@pytest.mark.parametrize("library", ["transformers", "deepspeed"])
def test_the_next_minor_release_is_not_allowed(library: str) -> None:
    [requirement] = [each for each in required() if each.name == library]
    major, minor = Version(versions.NEWEST_TESTED[library]).release[:2]
    assert not requirement.specifier.contains(f"{major}.{minor + 1}.0")


def test_a_newer_library_is_reported_in_one_line_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda name: "2.13.0+cpu" if name == "torch" else "99.0")
    monkeypatch.setattr(versions, "NEWEST_TESTED", {"torch": "2.13.0", "transformers": "5.24.0"})
    monkeypatch.setattr(sys, "argv", ["program"])
    for rank, expected in (("0", 1), ("1", 0)):
        caplog.clear()
        monkeypatch.setenv("RANK", rank)
        assert program.run(lambda: None, str) == 0
        assert [r.getMessage().startswith("transformers 99.0 is newer than 5.24.0") for r in caplog.records] == (
            [True] * expected
        )


def test_checking_versions_imports_no_library() -> None:
    code = "import sys; from clex_train.utils.versions import untested_warnings; untested_warnings(); "
    code += "print({'torch'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "set()"
