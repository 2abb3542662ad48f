"""References of docs/mathematics.md to code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mathematics.md"
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE.read_text(encoding="utf-8"))))


def defined_names(path: Path) -> set[str]:
    """Collect the functions, classes and `Class.method`s of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_the_page_has_a_reference_for_every_part_of_scaling() -> None:
    named = {file for file, _ in REFERENCES}
    modules = {f"clex_train/scaling/{path.name}" for path in (ROOT / "clex_train" / "scaling").glob("[a-z]*.py")}
    assert modules <= named


@pytest.mark.parametrize(("file", "name"), REFERENCES)
def test_references_of_equations_exist(file: str, name: str) -> None:
    assert name in defined_names(ROOT / file)
