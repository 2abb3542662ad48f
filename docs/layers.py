"""The table and the figure of layers in docs/architecture.md, from the import contract in pyproject.toml.

    python docs/layers.py

The contract names the layers of packages, the docstring of each package says what is in it.
"""

import ast
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FIGURE = ROOT / "docs" / "architecture.svg"
BEGIN, END = "<!-- layers: written by python docs/layers.py -->", "<!-- end of layers -->"
AROUND = ("launch", "data_prep")
"""Programs above the library, in packages of their own."""

BOX_HEIGHT, GAP, WIDTH, MARGIN = 34, 10, 860, 12
COLOURS = ("#e8eaf6", "#e3f2fd", "#e0f2f1", "#f1f8e9", "#fffde7", "#fff3e0", "#fbe9e7", "#f3e5f5")


def main() -> None:
    """Write the figure, and the table between the two marks of the page."""
    FIGURE.write_text(figure(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page(text: str) -> str:
    """Return the page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def table() -> str:
    """Return a Markdown table, the highest layer first."""
    rows = ["| layer | package | contents |", "|---|---|---|"]
    for number, layer in reversed(list(enumerate(reversed(layers())))):
        for i, name in enumerate(layer):
            rows.append(f"| {number if i == 0 else ''} | `{name}` | {meaning(name)} |")
    return "\n".join(rows)


def figure() -> str:
    """Return an SVG of one band a layer and one box a package."""
    bands = layers()
    height = MARGIN + len(bands) * (BOX_HEIGHT + GAP) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="13" role="img" aria-label="Layers of packages; a package imports from lower layers only">'
    ]
    for row, names in enumerate(bands):
        y = MARGIN + row * (BOX_HEIGHT + GAP)
        box = (WIDTH - 2 * MARGIN - GAP * (len(names) - 1)) / len(names)
        for column, name in enumerate(names):
            x = MARGIN + column * (box + GAP)
            parts.append(
                f'<g><title>{escape(meaning(name))}</title><rect x="{x:.1f}" y="{y}" width="{box:.1f}" '
                f'height="{BOX_HEIGHT}" rx="5" fill="{COLOURS[row % len(COLOURS)]}" stroke="#607d8b"/>'
                f'<text x="{x + box / 2:.1f}" y="{y + BOX_HEIGHT / 2 + 4.5}" text-anchor="middle" '
                f'fill="#263238">{escape(name)}</text></g>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def layers() -> list[list[str]]:
    """Return the packages of each layer, the highest layer first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (library,) = (contract for contract in contracts if contract.get("containers") == ["clex_train"])
    return [list(AROUND), *([name.strip() for name in layer.split("|")] for layer in library["layers"])]


def meaning(name: str) -> str:
    """Return the first sentence or line of the docstring of a package or module."""
    place = ROOT / name if name in AROUND else ROOT / "clex_train" / name
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file}: say in a docstring what the package holds"
    return docstring.splitlines()[0].rstrip(":.")


if __name__ == "__main__":
    main()
