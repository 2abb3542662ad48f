"""Helpers shared by benchmarks: machine name, allocator settings, and a Markdown page for console and file."""

import ctypes
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def publish(lines: Sequence[str], output: Path | None) -> None:
    """Print a page and, if requested, write it."""
    page = "\n".join(lines) + "\n"
    print(page)
    # The folder of results may not exist yet.
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")


def processor() -> str:
    """Return the CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Make the C library serve all sizes from its heap and keep freed memory; constants are from glibc's malloc.h."""
    trim_threshold, mmap_max = -1, -4
    library = ctypes.CDLL(None)
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)
    yield
    library.mallopt(mmap_max, 65536)
    library.mallopt(trim_threshold, 128 * 1024)
    library.malloc_trim(0)
