"""Evaluation files and what is made of them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from clex_train.evaluation import report, results
from clex_train.evaluation.report import Row
from clex_train.evaluation.results import Origin, Results, Score

LENGTHS = (128, 256, 2048)
ORIGIN = Origin("base", ["evaluate.py", "run=runs/base"], {"hash": "ab12"}, {"fingerprint": "cd"}, {"torch": "2"})


def outcome(perplexities: dict[str, list[float]], fingerprint: str = "f", protocol: str = "one_shot") -> Results:
    scores = [
        Score(
            method=method,
            protocol=protocol,
            length=length,
            frequencies="clex" if method == "trained" else method,
            t=length / 128,
            window_nll=[math.log(p) * 30, math.log(p) * 70],
            num_tokens=100,
            seconds=1.5,
        )
        for method, row in perplexities.items()
        for length, p in zip(LENGTHS, row, strict=True)
    ]
    windows = {"count": 2, "length": 2048, "score_stride": 128, "fingerprint": fingerprint, "documents": [4, 9]}
    return Results(scores, 128, windows)


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


def test_a_file_keeps_every_number_and_its_origin(files: dict[str, Path]) -> None:
    read, origin = results.read(files["base"])
    assert origin == ORIGIN
    assert read.metrics() == pytest.approx(outcome({"none": [35.0, 37.654, 1e7], "ntk": [35, 34.3, 12345.6]}).metrics())
    assert read.scores[0].window_nll == [math.log(35.0) * 30, math.log(35.0) * 70]
    content = json.loads(files["base"].read_text())
    assert content["metrics"]["perplexity/ntk/one_shot/256"] == pytest.approx(34.3)
    assert content["command"] == ["evaluate.py", "run=runs/base"]


def test_numbers_that_are_not_finite_survive_as_standard_json(tmp_path: Path) -> None:
    broken = Results([Score("none", "one_shot", 128, "none", 1.0, [math.nan, 1e9], 2, 0.1)], 128, {})
    results.write(tmp_path / "x.json", broken, ORIGIN)
    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["metrics"] == {"perplexity/none/one_shot/128": None}
    read, _ = results.read(tmp_path / "x.json")
    assert math.isnan(read.scores[0].perplexity)
    assert Score("none", "one_shot", 128, "none", 1.0, [1e9], 1, 0.1).perplexity == math.inf


def test_the_report_is_a_table_a_figure_and_their_sources(files: dict[str, Path], tmp_path: Path) -> None:
    text = report.write_report(rows_of(files), tmp_path / "out")
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "37.65" in text
    markdown = (tmp_path / "out" / "perplexity.md").read_text().splitlines()
    assert markdown[0] == "|  | 1x (128) | 2x (256) | 16x (2048) |"
    assert markdown[2] == "| base as it is | 35.00 | 37.65 | 1.0e+07 |"
    assert markdown[3] == "| NTK(2t-1), untrained | 35.00 | 34.30 | 12346 |"
    content = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert [row["label"] for row in content["rows"]] == ["base as it is", "NTK(2t-1), untrained", "CLEX"]
    assert content["rows"][2]["perplexity"]["2048"] == pytest.approx(36.5)
    assert content["rows"][0]["origin"]["model"] == {"hash": "ab12"}


def test_the_figure_is_drawn_and_holds_as_many_colours_as_rows(files: dict[str, Path], tmp_path: Path) -> None:
    report.plot(report.read_table(rows_of(files)), tmp_path / "figure.png")
    image = Image.open(tmp_path / "figure.png").convert("RGB")
    assert min(image.size) >= 600
    present = {colour for _, colour in image.getcolors(maxcolors=2**24)}
    wanted = [tuple(bytes.fromhex(colour[1:])) for colour in report.COLORS]
    assert [colour in present for colour in wanted] == [True] * 3 + [False] * (len(wanted) - 3)


def test_many_lengths_and_long_names_still_fit_the_console() -> None:
    scores = [Score("trained", "one_shot", 128 * 2**i, "clex", 2.0**i, [500.0], 100, 1.0) for i in range(14)]
    windows = {"count": 1, "fingerprint": "f", "documents": [0]}
    table = report.from_results(Results(scores, 128, windows), ORIGIN)
    curve = table.curves[0]
    long_named = report.Curve("a name " * 20, curve.method, curve.protocol, True, curve.perplexity, curve.origin)
    text = report.console(report.Table([long_named], 128, windows, 100))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert all(str(128 * 2**i) in text for i in range(14))


def test_a_single_evaluation_has_a_row_for_every_method_and_protocol() -> None:
    one, two = outcome({"none": [3, 4, 5]}), outcome({"none": [3, 4, 6]}, protocol="chunked")
    both = Results(one.scores + two.scores, 128, one.windows)
    assert [c.label for c in report.from_results(both, ORIGIN).curves] == ["none, one_shot", "none, chunked"]
    assert [c.label for c in report.from_results(one, ORIGIN).curves] == ["none"]


def test_evaluations_of_other_tokens_do_not_share_a_table(files: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    results.write(other, outcome({"none": [1.0, 2.0, 3.0]}, fingerprint="g"), ORIGIN)
    with pytest.raises(ValueError, match=r"other\.json: scored other tokens than .*clex\.json"):
        report.read_table([Row("a", files["clex"], "trained"), Row("b", other, "none")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as an evaluation"),
        ("{", "cannot be read as an evaluation"),
        ('{"format": 0}', "not an evaluation of format 1"),
    ],
)
def test_a_file_that_is_no_evaluation_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        results.read(path)


def test_a_row_that_was_not_evaluated_is_named_with_what_there_is(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"holds no pi/one_shot, only none/one_shot, ntk/one_shot"):
        report.read_table([Row("PI", files["base"], "pi")])


def with_fingerprints(result: Results, **fingerprints: str) -> Results:
    scores = [replace(score, fingerprint=fingerprints[score.protocol]) for score in result.scores]
    return replace(result, scores=scores, windows={**result.windows, "fingerprint": "w"})


def test_protocols_are_compared_with_themselves_and_only_if_asked_for(tmp_path: Path) -> None:
    both = Results(
        outcome({"none": [3, 4, 5]}).scores + outcome({"none": [3, 4, 6]}, protocol="last_k").scores,
        128,
        outcome({}).windows,
    )
    paths = {name: tmp_path / f"{name}.json" for name in "abc"}
    results.write(paths["a"], with_fingerprints(both, one_shot="1", last_k="2"), ORIGIN)
    results.write(paths["b"], with_fingerprints(both, one_shot="1", last_k="3"), ORIGIN)
    elsewhere = with_fingerprints(both, one_shot="1", last_k="2")
    results.write(paths["c"], replace(elsewhere, windows={**elsewhere.windows, "fingerprint": "v"}), ORIGIN)
    report.read_table([Row("a", paths["a"], "none"), Row("b", paths["b"], "none")])
    with pytest.raises(ValueError, match=r"b\.json: scored other tokens than .*a\.json \(last_k: fingerprints 3 and 2"):
        report.read_table([Row("a", paths["a"], "none", "last_k"), Row("b", paths["b"], "none", "last_k")])
    with pytest.raises(
        ValueError, match=r"c\.json: scored other tokens than .*a\.json \(windows: fingerprints v and w"
    ):
        report.read_table([Row("a", paths["a"], "none", "last_k"), Row("c", paths["c"], "none", "one_shot")])


def test_files_from_before_standard_errors_are_read_and_given_them(files: dict[str, Path]) -> None:
    content = json.loads(files["base"].read_text())
    newer = ("fingerprint", "standard_error", "mean_nll_standard_error", "standard_error_note", "curve")
    content["scores"] = [{k: v for k, v in row.items() if k not in newer} for row in content["scores"]]
    files["base"].write_text(json.dumps(content))
    read, _ = results.read(files["base"])
    assert read.metrics() == outcome({"none": [35.0, 37.654, 1e7], "ntk": [35.0, 34.3, 12345.6]}).metrics()
    assert {score.fingerprint for score in read.scores} == {"f"}
    assert read.scores[0].standard_error is not None
    results.write(files["clex"], with_fingerprints(outcome({"trained": [34.0, 33.0, 36.5]}), one_shot="f"), ORIGIN)
    report.read_table([Row("old", files["base"], "none"), Row("new", files["clex"], "trained")])
    results.write(files["clex"], with_fingerprints(outcome({"trained": [34.0, 33.0, 36.5]}), one_shot="g"), ORIGIN)
    with pytest.raises(ValueError, match="scored other tokens"):
        report.read_table([Row("old", files["base"], "none"), Row("new", files["clex"], "trained")])


def test_standard_errors_stand_beside_the_numbers_and_in_the_caption(tmp_path: Path) -> None:
    one = outcome({"none": [35.0, 37.654, 1e7]})
    scores = [replace(one.scores[0], standard_error=0.5612), *one.scores[1:]]
    last = [replace(score, protocol="last_k", num_tokens=7) for score in one.scores]
    table = report.from_results(Results([*scores, *last], 128, one.windows), ORIGIN)
    text = report.console(table)
    assert "35.00 ±0.56" in text
    assert "| none, one_shot | 35.00 ±0.56 | 37.65 | 1.0e+07 |" in report.markdown(table)
    assert "held-out tokens (one_shot: 100, last_k: 7), the same at every length" in text.replace("\n", " ")
    assert "one standard error, by a bootstrap over documents" in text.replace("\n", " ")


def test_a_file_keeps_errors_and_curves(tmp_path: Path) -> None:
    curve = ((0, 3.5, 4), (1, math.nan, 4))
    score = Score("none", "per_position", 128, "none", 1.0, [300.0, 310.0], 200, 0.1, "f", 0.5, 0.1, "", curve)
    results.write(tmp_path / "x.json", Results([score], 128, {"fingerprint": "w"}), ORIGIN)
    read = results.read(tmp_path / "x.json")[0].scores[0]
    assert (read.standard_error, read.mean_nll_standard_error, read.fingerprint) == (0.5, 0.1, "f")
    assert read.curve[0] == (0, 3.5, 4)
    assert math.isnan(read.curve[1][1])
