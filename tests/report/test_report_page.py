"""The HTML page of a report: self-contained, complete, safe, and correct in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clex_train.report.evidence import Evidence, collect
from clex_train.report.write import write
from tests.report.evaluation_files import add_to_file, make_run, task_row

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
HOSTILE = '<img src=x onerror="alert(1)"> & <b>'


@pytest.fixture(scope="module")
def written_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Path]:
    """Write a report on two runs, one with a hostile label, retrieval and learned frequencies."""
    folder = tmp_path_factory.mktemp("page")
    base = make_run(folder / "base", {"none": [35, 60, 900], "ntk": [35, 34, 50]}, learned=False)
    clex = make_run(folder / "clex", {"trained": [34, 33, 36]}, learned=True, label="clex")
    file = clex / "evaluation" / "clex.json"
    rows = [task_row("trained", n, d, int(10 * d)) for n in (256, 2048) for d in (0.0, 0.5, 1.0)]
    add_to_file(file, tasks=rows, label=HOSTILE, command=["python", HOSTILE])
    found = collect([base, clex])
    write(found, folder / "out", ["python", "-m", "clex_train.cli.report", HOSTILE])
    return found, folder / "out" / "index.html"


class Reader(HTMLParser):
    """Collect the tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def read(written_report: tuple[Evidence, Path]) -> Reader:
    return Reader(written_report[1].read_text(encoding="utf-8"))


def test_the_page_loads_and_runs_nothing(read: Reader, written_report: tuple[Evidence, Path]) -> None:
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "link", "iframe", "object", "img", "image", "base"})
    for _, attributes in read.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    page = written_report[1].read_text(encoding="utf-8")
    assert "://" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\(.", page)) <= {"url(#"}


def test_every_reference_has_a_target_and_every_id_is_unique(read: Reader) -> None:
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    used = [attributes["href"][1:] for _, attributes in read.tags if attributes.get("href")]
    clips = [m for _, a in read.tags for m in re.findall(r"url\(#(\w+)\)", " ".join(v or "" for v in a.values()))]
    assert set(used) | set(clips) <= set(ids)
    assert sorted({i for i in ids if ids.count(i) > 1 and i in {*used, *clips}}) == []


def test_all_numbers_and_sources_are_on_the_page(written_report: tuple[Evidence, Path], read: Reader) -> None:
    found, _ = written_report
    for table in found.tables:
        for curve in table.curves:
            assert curve.label in read.words
            assert {curve.cell(n) for n in curve.scores} <= set(read.words)
    text = " ".join(read.words)
    for expected in ("hash ab12", "fingerprint cd", "c0ffee", "fingerprint dd", "CPU, 2 cores", "50.0", "15 of 30"):
        assert expected in text
    assert "protocols=[per_position]" in text


def test_a_label_cannot_become_markup(written_report: tuple[Evidence, Path], read: Reader) -> None:
    page = written_report[1].read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>" not in page
    assert f"{HOSTILE}: trained" in read.words


def test_colours_follow_the_colour_scheme_of_the_reader(written_report: tuple[Evidence, Path]) -> None:
    page = written_report[1].read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 8
    assert all("#0072b2" not in drawing and "#333333" not in drawing for drawing in drawings)
    assert "prefers-color-scheme:dark" in page
    names = set(re.findall(r"var\((--\w+)\)", page))
    light, dark = re.search(r":root\{(.*?)\}", page), re.search(r"dark\)\{:root\{(.*?)\}", page)
    assert light is not None
    assert dark is not None
    for scheme in (light, dark):
        assert names <= set(re.findall(r"(--\w+):", scheme.group(1)))


@needs_browser
def test_a_browser_opens_the_page_without_console_messages(
    written_report: tuple[Evidence, Path], tmp_path: Path
) -> None:
    shown, log = browse(written_report[1], tmp_path)
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    assert shown.count("<svg") == 8


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_fits_its_screen_and_shows_each_figure_once(written_report, tmp_path: Path, width: int) -> None:
    # A script of the test measures the page from inside a frame as wide as the screen.
    measure = (
        "<script>addEventListener('load',()=>{const d=document,b=d.body,m=d.documentElement;"
        "const seen=[...d.querySelectorAll('svg')].map(s=>s.parentElement)"
        ".filter(s=>s.getBoundingClientRect().width>0);"
        "const out=seen.filter(s=>s.getBoundingClientRect().right>innerWidth+1).length;"
        "b.setAttribute('data-measured',[innerWidth,m.scrollWidth,seen.length,out].join(' '));"
        "parent.postMessage(b.getAttribute('data-measured'),'*')})</script></body>"
    )
    inner = tmp_path / "inner.html"
    inner.write_text(written_report[1].read_text(encoding="utf-8").replace("</body>", measure), encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><body><script>addEventListener('message',e=>document.body.append('measured '+e.data))</script>"
        f'<iframe src="inner.html" style="width:{width}px;height:900px;border:0"></iframe></body>',
        encoding="utf-8",
    )
    # A slow browser can finish the outer page before the inner one has reported.
    for _ in range(5):
        shown, _ = browse(outer, tmp_path)
        found = re.search(r"measured (\d+) (\d+) (\d+) (\d+)", shown)
        if found:
            break
    assert found is not None, shown[:500]
    inner_width, scroll_width, figures, sticking_out = map(int, found.groups())
    assert inner_width == width
    assert scroll_width <= width
    assert figures == 8
    assert sticking_out == 0


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """Return (the page after loading in a browser, the log of the browser)."""
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={profile / 'profile'}",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout, done.stderr
