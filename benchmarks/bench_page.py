"""What the benchmarks share: the machine's name, and one page of Markdown on the console and in a file."""

import platform
from collections.abc import Sequence
from pathlib import Path


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Print a page and, if asked, write it."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
