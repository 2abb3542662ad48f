"""Pages of the site that come from files outside docs/: the README as its home, and the tables of the benchmarks."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "contributing.md", content=contributing.replace("](docs/", "](")))
    for page in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        files.append(File.generated(config, f"benchmarks/{page.name}", content=page.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links that hold in a checkout into links of the site."""
    markdown = markdown.replace("](../README.md", "](index.md").replace("](../CONTRIBUTING.md", "](contributing.md")
    return re.sub(r"\]\(\.\./benchmarks/results/", "](benchmarks/", markdown)
