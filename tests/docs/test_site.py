"""The documentation site: navigation, links to source files, and up-to-date generated parts."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from launch import study_figure, study_record, study_tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    return program("layers")


def program(name: str) -> ModuleType:
    """Import a program of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_and_figure_of_layers_match_the_import_contract(layers: ModuleType) -> None:
    text = layers.PAGE.read_text(encoding="utf-8")
    assert text == layers.page(text), "run: python docs/layers.py"
    assert layers.FIGURE.read_text(encoding="utf-8") == layers.figure(), "run: python docs/layers.py"


def test_every_package_of_the_library_is_in_the_table(layers: ModuleType) -> None:
    named = {name for layer in layers.layers() for name in layer}
    found = {path.parent.name for path in (ROOT / "clex_train").glob("*/__init__.py")}
    assert found <= named
    assert named - found == {"launch", "data_prep", "api", "train"}


def _pages(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
    return [page for child in children for page in _pages(child)]


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert {*_pages(settings["nav"])} == pages | {"index.md", "contributing.md"}


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_source_files_named_on_a_page_exist(page: Path) -> None:
    named = set(re.findall(r"(?:\w+/)+\w+\.py\b", page.read_text(encoding="utf-8")))
    of_libraries = {name for name in named if name.startswith("deepspeed/")}
    missing = {
        name for name in named - of_libraries if not any((ROOT / top / name).exists() for top in ("", "clex_train"))
    }
    assert missing == set()


@pytest.mark.parametrize("page", sorted((DOCS / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_every_name_in_the_reference_exists(page: Path) -> None:
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        parts = name.split(".")
        file = next(
            (
                place
                for i in range(len(parts), 0, -1)
                if (place := ROOT.joinpath(*parts[:i]).with_suffix(".py")).is_file()
            ),
            None,
        )
        assert file is not None, name
        rest = parts[len(file.relative_to(ROOT).with_suffix("").parts) :]
        assert not rest or re.search(rf"^(def|class) {rest[0]}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_glossary_is_sorted_and_has_about_25_terms() -> None:
    terms = re.findall(r"^\*\*(.+)\*\*\n: ", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) >= 25
    assert terms == sorted(terms, key=str.casefold)


def test_the_layers_program_runs(layers: ModuleType, monkeypatch, tmp_path: Path) -> None:
    page = tmp_path / "architecture.md"
    page.write_text(f"before\n{layers.BEGIN}\nstale line\n{layers.END}\nafter\n")
    monkeypatch.setattr(layers, "PAGE", page)
    monkeypatch.setattr(layers, "FIGURE", tmp_path / "architecture.svg")
    monkeypatch.setattr(sys, "argv", ["layers.py"])
    layers.main()
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nafter\n")
    assert "| 0 | `utils` |" in page.read_text()
    assert "stale line" not in page.read_text()


def test_the_tables_of_the_results_are_those_of_the_committed_record() -> None:
    printed = study_tables.text(study_record.read(study_figure.RECORD))
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    tables = [block for block in page.split("\n\n") if block.startswith("|  | 1x (128)")]
    assert len(tables) == 6
    assert [block for block in tables if block.strip() not in printed] == []


def test_the_results_figure_shows_the_committed_record() -> None:
    assert study_figure.recorded_digest() == study_figure.digest(), "run: python -m launch.study_figure"
