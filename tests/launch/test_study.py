"""The driver of the study, its record, and its tables, on synthetic evaluation files."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clex_train.evaluation.measure_scores import MeasureScore
from clex_train.evaluation.results import Origin, Results, Score, write
from launch import study, study_record, study_stages, study_tables
from launch.study_arms import ARMS, CHOOSING, JUDGING, REFERENCE, TAX_AGAINST, Arm
from launch.study_record import Record
from tests.helpers.composing import composed

LENGTHS = (128, 256)
YARN, STATIC = "yarn", "static"


def write_evaluation(
    run: Path,
    nll: float,
    method: str = "trained",
    fingerprint: str = "same",
    exact: int = 3,
    windows: str = CHOOSING.name,
) -> None:
    """Write an evaluation of two windows of 10 tokens from two books: `nll` nats a token, and 0.5 more."""
    scores = [
        Score(method, protocol, n, "x", 1.0, [10 * nll, 10 * (nll + 0.5)], 20, 0.0, fingerprint=fingerprint)
        for protocol in study_tables.PROTOCOLS
        for n in LENGTHS
    ]
    how = {"sums": [1.0] * exact + [0.0] * (4 - exact), "counts": [1] * 4, "groups": [0] * 4, "seed": 0}
    keys = [MeasureScore("forced_passkey", "exact", method, 128, depth, **how) for depth in (0.1, 0.9)]
    chosen = {"count": 2, "length": 256, "documents": [0, 1], "starts": [0, 0], "fingerprint": "w"}
    path = run / "evaluation" / f"{windows}.json"
    write(path, Results(scores, 128, chosen, measures=keys), Origin("x", [], {}, {}, {"torch": "2.13.0"}))


def collected(out: Path, seeds: tuple[int, ...] = (1,)) -> Record:
    """Collect the evaluations below a folder, through the file."""
    study_record.write(study_record.collect(out, seeds), out / "study.json")
    return study_record.read(out / "study.json")


def rows(text: str) -> dict[str, list[str]]:
    """Map the first cell of each row of a table to the others."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in cells}


def label(name: str) -> str:
    return next(arm.label for arm in ARMS if arm.name == name)


def test_a_row_is_the_mean_nll_over_the_seeds_and_over_the_windows(tmp_path):
    write_evaluation(tmp_path / YARN / "seed_1", 2.0)
    write_evaluation(tmp_path / YARN / "seed_2", 3.0)
    record = collected(tmp_path, (1, 2))
    (line,) = study_tables.lines(record.entries, CHOOSING.name, "one_shot")
    found = rows(study_tables.table([line], study_tables.perplexity_cell, 128))[label(YARN)]
    assert found == [f"{math.exp(2.75):.2f}", f"{math.exp(2.75):.2f}", "2"]
    assert record.made_by == {"torch": "2.13.0"}


def test_paired_differences_cancel_the_books_and_keep_the_spread_of_the_seeds(tmp_path):
    for seed, shift in ((1, 0.0), (2, 0.02)):
        write_evaluation(tmp_path / YARN / f"seed_{seed}", 2.0)
        write_evaluation(tmp_path / STATIC / f"seed_{seed}", 2.1 + shift)
    yarn, static = study_tables.lines(collected(tmp_path, (1, 2)).entries, CHOOSING.name, "one_shot")
    mean, error = study_tables.difference(static, yarn, 128)
    assert mean == pytest.approx(0.11)
    assert error == pytest.approx(0.01), "half the distance of two seeds; the books are equally hard for both"
    assert study_tables.against(yarn)(yarn, 128) == "0"
    single = replace(static, nll={n: nll[:1] for n, nll in static.nll.items()})
    assert study_tables.difference(single, replace(yarn, nll={n: v[:1] for n, v in yarn.nll.items()}), 128)[1] < 1e-15


def test_the_tables_have_the_differences_the_tax_and_retrieval(tmp_path):
    write_evaluation(tmp_path / YARN / "seed_1", 2.0)
    write_evaluation(tmp_path / STATIC / "seed_1", 2.1, exact=4)
    write_evaluation(tmp_path / "continued" / "seed_1", 2.05, method="none")
    text = study_tables.text(collected(tmp_path))
    parts = dict(zip(text.split("\n\n")[::2], text.split("\n\n")[1::2], strict=True))
    title = f"### one_shot, windows `choosing`: percent above `{REFERENCE}`"
    assert rows(parts[title])[label(STATIC)][0] == f"{100 * math.expm1(0.1):+.1f} ± 0.0"
    first = rows(parts["### one_shot, windows `choosing`: perplexity"])
    assert first[label(STATIC)][2] == f"{100 * math.expm1(0.05):+.1f} ± 0.0"
    assert first[TAX_AGAINST][2] == "0"
    exact = next(part for name, part in parts.items() if name.startswith("### passkey, percent"))
    assert rows(exact)[label(STATIC)] == ["100", "8"]
    assert rows(exact)[label(YARN)] == ["75", "8"]


def test_an_arm_that_scored_different_tokens_is_refused_by_name(tmp_path):
    write_evaluation(tmp_path / YARN / "seed_1", 2.0)
    write_evaluation(tmp_path / STATIC / "seed_1", 2.0, fingerprint="other")
    with pytest.raises(ValueError, match=f"{label(STATIC)}: its runs scored different tokens"):
        study_record.collect(tmp_path, [1])


def test_windows_longer_than_l_alone_are_named_in_units_of_l_and_have_no_tax(tmp_path):
    write_evaluation(tmp_path / YARN / "seed_1", 2.0)
    record = collected(tmp_path)
    entry = replace(record.entries[0], nll={"one_shot": {256: record.entries[0].nll["one_shot"][256]}})
    text = study_tables.section(replace(record, entries=[entry]), CHOOSING.name, "one_shot")
    assert text.count("|  | 2x (256) | seeds |") == 2
    assert "tax" not in text


def test_a_committed_record_prints_the_same_tables_again(tmp_path, capsys, monkeypatch):
    write_evaluation(tmp_path / YARN / "seed_1", 2.0)
    expected = study_tables.text(collected(tmp_path))
    monkeypatch.setattr(sys, "argv", ["study_tables", str(tmp_path / "study.json")])
    assert study_tables.main() == 0
    assert capsys.readouterr().out == expected
    (tmp_path / "study.json").write_text("{}")
    assert study_tables.main() == 2
    assert "not a record of the study" in capsys.readouterr().err


def test_an_arm_is_scored_for_choosing_once_and_for_judging_with_the_seeds_that_it_says():
    plan = study.Study("books", Path("out"), [1, 2, 3], smoke=False)
    pairs = [pair for wave in plan.waves() for pair in wave]
    scored = [(arm.name, seed, windows.name) for arm, seed in pairs for windows in plan.windows(arm, seed)]
    judging = {(arm.name, seed, JUDGING.name) for arm in ARMS for seed in range(1, arm.judged + 1)}
    choosing = {(arm.name, 1, CHOOSING.name) for arm in ARMS if arm.choosing}
    assert len(scored) == len(set(scored))
    assert set(scored) == judging | choosing
    assert all(arm.judged or arm.choosing for arm in ARMS)
    alone = study.Study("books", Path("out"), [1, 2], smoke=False, only=[YARN])
    assert [[(arm.name, seed) for arm, seed in wave] for wave in alone.waves()] == [[(YARN, 1), (YARN, 2)], []]


def test_an_arm_that_evaluates_weights_of_another_comes_after_it():
    training, borrowing = study.Study("books", Path("out"), [1], smoke=False).waves()
    trained = {arm.name for arm, _ in training}
    assert borrowing
    for arm, _ in borrowing:
        assert arm.weights_of in trained
        assert arm.name not in trained
        assert not arm.overrides, "it trains nothing"


def test_differences_can_be_counted_from_another_row_and_over_some_seeds(tmp_path):
    for name, nll in ((YARN, 2.0), (STATIC, 2.1)):
        for seed in (1, 2):
            write_evaluation(tmp_path / name / f"seed_{seed}", nll + 0.1 * (seed == 2) * (name == YARN))
    record = study_tables.chosen(collected(tmp_path, (1, 2)), label(STATIC), [1])
    text = study_tables.section(record, CHOOSING.name, "one_shot")
    assert f"percent above `{label(STATIC)}`" in text
    assert f"| {label(YARN)} | {100 * math.expm1(-0.1):+.1f} ± 0.0 |" in text
    for against, seeds, key in (("other", None, "--against=other"), (None, [7], r"--seeds=\[7\]")):
        with pytest.raises(ValueError, match=key):
            study_tables.chosen(record, against, seeds)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_training_configuration(arm: Arm):
    composed("+experiment=study_finetune", *arm.overrides)


def test_names_and_labels_are_unique():
    assert len({arm.name for arm in ARMS}) == len({arm.label for arm in ARMS}) == len(ARMS)
    assert REFERENCE in {arm.label for arm in ARMS}


def test_a_finished_stage_is_skipped_and_a_failing_one_is_named(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    study_stages.run(tmp_path, tmp_path / "there", ["no-such-program"])
    with pytest.raises(subprocess.CalledProcessError) as error:
        study_stages.run(tmp_path, tmp_path / "missing", [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert (tmp_path / "log" / "missing.txt").read_text() == "why\n"
    assert study_stages.failed(error.value) == 3
    assert capsys.readouterr().err == f"error: exit code 3, {tmp_path / 'log' / 'missing.txt'}: why\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "yarn", "clx"], "argument --only: invalid choice: 'clx'"),
        (["--jobs", "0"], "argument --jobs: 0: at least 1"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (
            [],
            "error: --books={books}: no such file, directory or glob; name files that the corpus local_books can read",
        ),
    ],
)
def test_unusable_inputs_are_refused_before_any_stage(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_stages, "run", lambda *_: pytest.fail("a stage began"))
    books = str(tmp_path / "*.jsonl.zst")
    monkeypatch.setattr(sys, "argv", ["study", "--books", books, "--out", str(tmp_path / "out"), *arguments])
    try:
        code = study.main()
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message.format(books=books) in capsys.readouterr().err
