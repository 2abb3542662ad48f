"""The driver of the study and its tables, on synthetic evaluation files."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from clex_train.evaluation.results import Origin, Results, Score, write
from launch import study, study_tables
from launch.study_arms import ABLATIONS, JUDGING, MAIN, Arm

LENGTHS = (128, 256)


def write_evaluation(run: Path, method: str, nll: float, fingerprint: str = "same") -> None:
    """Write an evaluation of two windows of 10 tokens from two books: `nll` nats a token, and 0.5 more."""
    scores = [
        Score(method, protocol, n, "x", 1.0, [10 * nll, 10 * (nll + 0.5)], 20, 0.0, fingerprint=fingerprint)
        for protocol in study_tables.PROTOCOLS
        for n in LENGTHS
    ]
    windows = {"count": 2, "length": 256, "documents": [0, 1], "starts": [0, 0], "fingerprint": "w"}
    write(run / "evaluation" / f"{JUDGING.name}.json", Results(scores, 128, windows), Origin("x", [], {}, {}))


def rows(text: str) -> dict[str, list[str]]:
    """Map the first cell of each row of the first table of a text to the others."""
    table = text.split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {line[0]: line[1:] for line in cells}


def test_a_row_is_the_mean_nll_over_the_seeds_and_over_the_windows(tmp_path):
    write_evaluation(tmp_path / "clex" / "seed_1", "trained", 2.0)
    write_evaluation(tmp_path / "clex" / "seed_2", "trained", 3.0)
    found = rows(study_tables.section(tmp_path, [1, 2], "one_shot"))
    assert found["CLEX, t of the length"][-1] == "2"
    assert float(found["CLEX, t of the length"][0].split(" ± ")[0]) == pytest.approx(math.exp(2.75), abs=0.01)


def test_paired_differences_cancel_the_shared_difficulty_of_a_book(tmp_path):
    write_evaluation(tmp_path / "clex" / "seed_1", "trained", 2.0)
    write_evaluation(tmp_path / "pi" / "seed_1", "trained", 2.1)
    pi, clex = study_tables.arm_lines(tmp_path, MAIN, [1], "one_shot", JUDGING)
    assert study_tables.against(clex)(pi, 128) == f"+{100 * math.expm1(0.1):.1f} ± 0.0"
    assert float(study_tables.perplexity_cell(pi, 128).split(" ± ")[1]) > 0.5
    assert study_tables.against(clex)(clex, 128) == "0"


def test_an_arm_whose_seeds_scored_different_tokens_is_refused_by_name(tmp_path):
    write_evaluation(tmp_path / "clex" / "seed_1", "trained", 2.0)
    write_evaluation(tmp_path / "clex" / "seed_2", "trained", 2.0, fingerprint="other")
    with pytest.raises(ValueError, match="CLEX, t of the length: its runs scored different tokens"):
        study_tables.section(tmp_path, [1, 2], "one_shot")


def test_selection_windows_are_not_read_for_the_main_table(tmp_path):
    write_evaluation(tmp_path / "clex" / "seed_1", "trained", 2.0)
    folder = tmp_path / "clex" / "seed_1" / "evaluation"
    (folder / f"{JUDGING.name}.json").rename(folder / "choosing.json")
    assert "CLEX" not in study_tables.section(tmp_path, [1], "one_shot")


def test_the_runs_have_each_arm_once_and_the_main_ones_for_every_seed():
    plan = study.Study("books", Path("out"), [1, 2, 3], smoke=False)
    pairs = [(arm.name, seed) for wave in plan.waves() for arm, seed in wave]
    assert len(pairs) == len(set(pairs)) == 3 * len(MAIN) + len(ABLATIONS)
    alone = study.Study("books", Path("out"), [1, 2], smoke=False, only=["clex"])
    assert [[(arm.name, seed) for arm, seed in wave] for wave in alone.waves()] == [[("clex", 1), ("clex", 2)], []]


def test_an_arm_that_evaluates_weights_of_another_comes_after_it():
    training, borrowing = study.Study("books", Path("out"), [1], smoke=False).waves()
    trained = {arm.name for arm, _ in training}
    assert borrowing
    for arm, _ in borrowing:
        assert arm.weights_of in trained
        assert arm.name not in trained
        assert not arm.overrides, "it trains nothing"


def test_every_arm_is_a_valid_training_configuration(compose_arm):
    for arm in (*MAIN, *ABLATIONS):
        compose_arm(arm)


@pytest.fixture
def compose_arm():
    from tests.helpers.composing import composed

    def compose(arm: Arm) -> None:
        composed("+experiment=study_finetune", "data.path=x", *arm.overrides)

    return compose


def test_a_finished_stage_is_skipped_and_a_failing_one_is_named(tmp_path, capsys):
    plan = study.Study("books", tmp_path, [1], smoke=False)
    (tmp_path / "there").mkdir()
    study.stage(plan, tmp_path / "there", ["no-such-program"])
    with pytest.raises(subprocess.CalledProcessError) as error:
        study.stage(plan, tmp_path / "missing", [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert (tmp_path / "log" / "missing.txt").read_text() == "why\n"
    assert study.failed(error.value) == 3
    assert capsys.readouterr().err == f"error: exit code 3, {tmp_path / 'log' / 'missing.txt'}: why\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "clex", "clx"], "argument --only: invalid choice: 'clx'"),
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
    monkeypatch.setattr(study, "stage", lambda *_: pytest.fail("a stage began"))
    books = str(tmp_path / "*.jsonl.zst")
    monkeypatch.setattr(sys, "argv", ["study", "--books", books, "--out", str(tmp_path / "out"), *arguments])
    try:
        code = study.main()
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message.format(books=books) in capsys.readouterr().err
