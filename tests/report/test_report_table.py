"""Evaluation files and the tables made from them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from clex_train.evaluation import results
from clex_train.evaluation.results import NO_WINDOWS, Results, Score
from clex_train.evaluation.tables import Row, Table, console, from_results, markdown, read_tables
from tests.report.evaluation_files import ORIGIN, outcome


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    base = outcome({"none": [35.0, 37.654, 1e7], "ntk": [35.0, 34.3, 12345.6]})
    clex = outcome({"trained": [34.0, 33.0, 36.5]})
    paths = {"base": tmp_path / "base" / "evaluation.json", "clex": tmp_path / "clex.json"}
    results.write(paths["base"], base, ORIGIN)
    results.write(paths["clex"], clex, ORIGIN)
    return paths


def rows_of(files: dict[str, Path]) -> list[Row]:
    return [
        Row("base as it is", files["base"], "none"),
        Row("NTK(2t-1), untrained", files["base"], "ntk"),
        Row("CLEX", files["clex"], "trained"),
    ]


def test_a_file_preserves_every_number_and_its_origin(files: dict[str, Path]) -> None:
    read, origin = results.read(files["base"])
    assert origin == ORIGIN
    assert read.metrics() == pytest.approx(outcome({"none": [35.0, 37.654, 1e7], "ntk": [35, 34.3, 12345.6]}).metrics())
    assert read.scores[0].window_nll == [math.log(35.0) * 30, math.log(35.0) * 70]
    content = json.loads(files["base"].read_text())
    assert content["metrics"]["perplexity/ntk/one_shot/256"] == pytest.approx(34.3)
    assert content["command"] == ORIGIN.command


def test_non_finite_numbers_survive_as_standard_json(tmp_path: Path) -> None:
    broken = Results([Score("none", "one_shot", 128, "none", 1.0, [math.nan, 1e9], 2, 0.1)], 128, NO_WINDOWS)
    results.write(tmp_path / "x.json", broken, ORIGIN)
    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["metrics"] == {"perplexity/none/one_shot/128": None}
    read, _ = results.read(tmp_path / "x.json")
    assert math.isnan(read.scores[0].perplexity)
    assert Score("none", "one_shot", 128, "none", 1.0, [1e9], 1, 0.1).perplexity == math.inf


def test_markdown_has_a_row_per_method_and_marks_the_lowest_of_each_column(files: dict[str, Path]) -> None:
    lines = markdown(read_tables(rows_of(files))).splitlines()
    assert lines[0] == "|  | 1x (128) | 2x (256) | 16x (2048) |"
    assert lines[2] == "| base as it is | 35.00 | 37.65 | 1.0e+07 |"
    assert lines[3] == "| NTK(2t-1), untrained | 35.00 | 34.30 | 12346 |"
    assert lines[4] == "| CLEX | **34.00** | **33.00** | **36.50** |"
    assert lines[6].endswith("2 windows of 2 documents. Bold: the lowest of a column.")


def test_a_label_cannot_break_out_of_its_markdown_cell(files: dict[str, Path]) -> None:
    table = markdown(read_tables([Row("a|b *x* [y](z)\nc_d _e_ <i>", files["clex"], "trained")]))
    assert table.splitlines()[2].startswith(r"| a\|b \*x\* \[y\](z) c_d \_e\_ \<i\> | 34.00")


def test_rows_that_print_equal_share_the_mark_and_a_column_of_equals_has_none() -> None:
    table = from_results(outcome({"none": [35.001, 4, 6], "pi": [35.0, 4, 5], "ntk": [36, 4, math.inf]}), ORIGIN)
    assert [table.best(n) for n in (128, 256, 2048)] == [{0, 1}, set(), {1}]


def test_standard_errors_are_next_to_the_numbers_and_in_the_caption() -> None:
    one = outcome({"none": [35.0, 37.654, 1e7]})
    scores = [replace(one.scores[0], standard_error=0.5612), *one.scores[1:]]
    last = [replace(score, protocol="last_k", num_tokens=7) for score in one.scores]
    table = from_results(Results([*scores, *last], 128, one.windows), ORIGIN)
    shown = console(table)
    assert "35.00 ±0.56" in shown
    assert "| none, one_shot | **35.00** ±0.56 | **37.65** | **1.0e+07** |" in markdown([table])
    assert "held-out tokens (one_shot: 100, last_k: 7), the same at every length" in shown.replace("\n", " ")
    assert "one standard error, by a bootstrap over documents" in shown.replace("\n", " ")


def test_many_lengths_and_long_names_still_fit_the_console() -> None:
    scores = [Score("trained", "one_shot", 128 * 2**i, "clex", 2.0**i, [500.0], 100, 1.0) for i in range(14)]
    windows = {"count": 1, "length": 128, "fingerprint": "f", "documents": [0]}
    table = from_results(Results(scores, 128, windows), ORIGIN)
    curve = table.curves[0]
    long_named = replace(curve, label="a name " * 20)
    shown = console(Table([long_named], windows))
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert all(str(128 * 2**i) in shown for i in range(14))


def test_a_single_evaluation_has_a_row_for_every_method_and_protocol() -> None:
    one, two = outcome({"none": [3, 4, 5]}), outcome({"none": [3, 4, 6]}, protocol="chunked")
    both = Results(one.scores + two.scores, 128, one.windows)
    assert [c.label for c in from_results(both, ORIGIN).curves] == ["none, one_shot", "none, chunked"]
    assert [c.label for c in from_results(one, ORIGIN).curves] == ["none"]


def test_evaluations_of_different_tokens_are_in_separate_tables(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    results.write(other, outcome({"none": [1.0, 2.0, 3.0]}, fingerprint="g"), ORIGIN)
    rows = [Row("a", files["clex"], "trained"), Row("b", other, "none"), Row("c", files["base"], "none")]
    assert [[curve.label for curve in table.curves] for table in read_tables(rows)] == [["a", "c"], ["b"]]


def test_protocols_have_separate_tables_except_a_stream_and_its_windows(tmp_path: Path) -> None:
    path, names = tmp_path / "x.json", ("one_shot", "windows", "chunked", "streaming")
    scores = [score for name in names for score in outcome({"none": [3, 4, 5]}, protocol=name).scores]
    results.write(path, Results(scores, 128, outcome({}).windows), ORIGIN)
    tables = read_tables([Row(name, path, "none", name) for name in names])
    assert [table.protocols for table in tables] == [["one_shot"], ["windows", "streaming"], ["chunked"]]


def test_rows_trained_at_different_lengths_show_no_multiples(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, context_len in zip(paths, (128, 256), strict=True):
        results.write(path, outcome({"none": [3, 4, 5]}, context_len=context_len), ORIGIN)
    [table] = read_tables([Row(path.name, path, "none") for path in paths])
    assert (table.context_len, table.context_lens) == (None, [128, 256])
    assert markdown([table]).startswith("|  | 128 | 256 | 2048 |\n")
    assert console(table).splitlines()[2].startswith("length in tokens")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as an evaluation"),
        ("{", "cannot be read as an evaluation"),
        ('{"format": 0}', "not an evaluation of format 1"),
    ],
)
def test_a_file_that_is_not_an_evaluation_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        results.read(path)


def test_a_missing_row_is_named_with_the_existing_ones(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"holds no pi/one_shot, only none/one_shot, ntk/one_shot"):
        read_tables([Row("PI", files["base"], "pi")])


def with_fingerprints(result: Results, **fingerprints: str) -> Results:
    scores = [replace(score, fingerprint=fingerprints[score.protocol]) for score in result.scores]
    return replace(result, scores=scores, windows={**result.windows, "fingerprint": "w"})


def test_protocols_are_grouped_by_the_tokens_that_they_scored(tmp_path: Path) -> None:
    both = Results(
        outcome({"none": [3, 4, 5]}).scores + outcome({"none": [3, 4, 6]}, protocol="last_k").scores,
        128,
        outcome({}).windows,
    )
    rows = []
    for name, last in (("a", "2"), ("b", "3")):
        results.write(tmp_path / f"{name}.json", with_fingerprints(both, one_shot="1", last_k=last), ORIGIN)
        rows += [Row(name, tmp_path / f"{name}.json", "none", protocol) for protocol in ("one_shot", "last_k")]
    groups = [(table.protocols, [curve.label for curve in table.curves]) for table in read_tables(rows)]
    assert groups == [(["one_shot"], ["a", "b"]), (["last_k"], ["a"]), (["last_k"], ["b"])]


def test_older_files_are_read_and_get_standard_errors(files: dict[str, Path]) -> None:
    content = json.loads(files["base"].read_text())
    newer = ("fingerprint", "standard_error", "mean_nll_standard_error", "standard_error_note", "curve")
    content["scores"] = [{k: v for k, v in row.items() if k not in newer} for row in content["scores"]]
    files["base"].write_text(json.dumps(content))
    read, _ = results.read(files["base"])
    assert read.metrics() == outcome({"none": [35.0, 37.654, 1e7], "ntk": [35.0, 34.3, 12345.6]}).metrics()
    assert {score.fingerprint for score in read.scores} == {"f"}
    assert read.scores[0].standard_error is not None
    results.write(files["clex"], with_fingerprints(outcome({"trained": [34.0, 33.0, 36.5]}), one_shot="f"), ORIGIN)
    rows = [Row("old", files["base"], "none"), Row("new", files["clex"], "trained")]
    assert len(read_tables(rows)) == 1
    results.write(files["clex"], with_fingerprints(outcome({"trained": [34.0, 33.0, 36.5]}), one_shot="g"), ORIGIN)
    assert len(read_tables(rows)) == 2


def test_a_file_preserves_standard_errors_and_curves(tmp_path: Path) -> None:
    curve = ((0, 3.5, 4), (1, math.nan, 4))
    score = Score("none", "per_position", 128, "none", 1.0, [300.0, 310.0], 200, 0.1, "f", 0.5, 0.1, "", curve)
    results.write(tmp_path / "x.json", Results([score], 128, {**NO_WINDOWS, "fingerprint": "w"}), ORIGIN)
    read = results.read(tmp_path / "x.json")[0].scores[0]
    assert (read.standard_error, read.mean_nll_standard_error, read.fingerprint) == (0.5, 0.1, "f")
    assert read.curve[0] == (0, 3.5, 4)
    assert math.isnan(read.curve[1][1])
