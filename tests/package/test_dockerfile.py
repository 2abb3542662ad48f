"""Checks of the Dockerfile without a daemon: syntax, pinned images and copied files."""

import json
import re
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"FROM", "RUN", "COPY", "ENV", "ARG", "WORKDIR", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, argument) of each line, with continued lines joined and without comments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in joined.splitlines() if line.strip()]


def test_every_line_is_an_instruction_and_the_first_names_a_base() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= KNOWN
    assert names[0] == "FROM"
    assert names.count("CMD") == 1
    assert json.loads(instructions()[-1][1]) == ["clex-train", "info"]


def test_images_are_pinned_to_a_release() -> None:
    images = [text for name, text in instructions() if name == "FROM"]
    images += [match for _, text in instructions() for match in re.findall(r"--from=(\S+)", text)]
    assert len(images) == 2
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+", image), f"{image}: a tag without a full version moves"


def test_copied_files_exist_and_are_not_ignored() -> None:
    ignored = set((ROOT / ".dockerignore").read_text(encoding="utf-8").split())
    for text in (text for name, text in instructions() if name == "COPY" and "--from" not in text):
        for source in text.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source not in ignored
    needed = {"pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "train.py", "conf", "clex_train", "launch"}
    assert not needed & ignored, "the build reads them"
    assert {".venv", ".git", "runs", "corpora", ".env"} <= ignored


def test_python_is_a_version_that_the_package_allows() -> None:
    (python,) = re.findall(r"uv venv --python (\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")


def test_packages_are_installed_with_the_pinned_versions() -> None:
    (command,) = [text for _, text in instructions() if "-r requirements.txt" in text]
    assert "-c constraints.txt" in command
