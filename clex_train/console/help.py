"""`--help` of train.py and docs/configuration.md, both from the schema and the comments in conf/.

python -m clex_train.console.help > docs/configuration.md
"""

import re
import textwrap
from collections.abc import Iterator
from itertools import groupby, takewhile
from pathlib import Path

from clex_train.config.docs import describe
from clex_train.config.root import Config
from clex_train.utils.locations import CONF

GROUPS = ("model", "data", "scaling", "attention", "adapter", "engine", "optim", "evaluation", "tracking", "launch")
WIDTH = 116

USAGE = """\
Train or fine-tune a model with CLEX.

    deepspeed train.py +experiment=NAME [key=value ...]       all GPUs of this machine, or its CPU
    torchrun --standalone --nproc_per_node 2 train.py ...     the same with torch's launcher
    python train.py +experiment=NAME ...                      one process

    ... dry_run=true engine.world_size=64                     sizes, memory and tokens; nothing is loaded
    ... --cfg job                                             the composed configuration
    ... -m optim.lr=1e-5,2e-5                                 a sweep, one run after another
    ... group=option group.key=value                          another option of a group, another value of a key
"""


def help_text() -> str:
    """Return the text of `python train.py --help`: usage, groups and their options, experiments, every key."""
    parts = [USAGE, "Groups and their options\n"]
    parts += [_indented(f"{group:<11} {', '.join(name for name, _ in options(group))}", 2, 14) for group in GROUPS]
    parts.append("\nExperiments\n")
    parts += [_indented(f"{name:<28} {comment}", 2, 31) for name, comment in options("experiment")]
    parts.append("\nKeys: name=default (type) and meaning")
    for key, kind, default, meaning in _in_order():
        # A space after each bar lets long lists of choices wrap.
        head = f"{key}={default}  ({kind})" if len(kind) < 80 else f"{key}={default}  ({kind.replace('|', ' | ')})"
        parts.append(f"\n{_indented(head, 2, 6)}\n{_indented(meaning.replace('`', ''), 6, 6)}")
    return "\n".join(parts) + "\n"


def markdown() -> str:
    """Return the text of docs/configuration.md."""
    return "\n".join(_markdown_lines()) + "\n"


def options(group: str) -> list[tuple[str, str]]:
    """List the options of a group of conf/, with the first sentence of the comment that opens each file."""
    return [(file.stem, _first_comment(file)) for file in sorted((CONF / group).glob("*.yaml"))]


def _markdown_lines() -> Iterator[str]:
    yield "# Configuration"
    yield ""
    yield "Written by `python -m clex_train.console.help > docs/configuration.md` from the schema in"
    yield "`clex_train/config/` and the comments in `conf/`; `python train.py --help` prints the same."
    yield ""
    yield "A run takes one option of each group, an experiment that overrides them, and the command line:"
    yield "`deepspeed train.py +experiment=llama2_7b_clex engine=zero3_offload optim.lr=1e-5`."
    for group in (*GROUPS, "experiment"):
        yield f"\n## {group}: options\n"
        yield "| option | what it is |"
        yield "|---|---|"
        yield from (f"| `{name}` | {comment} |" for name, comment in options(group))
    for group, rows in groupby(_in_order(), key=_group):
        yield f"\n## {group or 'top level'}: keys\n"
        yield "| key | type | default | meaning |"
        yield "|---|---|---|---|"
        for key, kind, default, meaning in rows:
            cells = (f"`{key}`", f"`{kind}`".replace("|", "\\|"), f"`{default}`", meaning.replace("|", "\\|"))
            yield f"| {' | '.join(cells)} |"


def _in_order() -> list[tuple[str, str, str, str]]:
    """List the keys outside any group first, then group by group."""
    rows = [(key, kind.replace("?", " or null"), default, meaning) for key, kind, default, meaning in describe(Config)]
    return sorted(rows, key=lambda row: "." in row[0])


def _group(row: tuple[str, str, str, str]) -> str:
    return row[0].rpartition(".")[0]


def _first_comment(file: Path) -> str:
    """Return the first sentence of the comment that opens a file."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    words = [line.removeprefix("#").strip() for line in lines if not line.startswith("# @package")]
    return re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0]


def _indented(text: str, first: int, later: int) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * first, subsequent_indent=" " * later)


if __name__ == "__main__":
    print(markdown(), end="")
