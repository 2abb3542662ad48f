"""The plan of the study on a real model: its order, its arms, and the tables of what has been read."""

from pathlib import Path

import pytest

from clex_train.cli.evaluation_plan import parse
from launch import pretrained_study as study
from launch.study_arms import Arm
from tests.helpers.composing import composed
from tests.launch.test_study import write_evaluation


def planned(smoke: bool = False) -> study.Study:
    return study.Study(Path("out"), 600, "fp32", study.SMOKE if smoke else study.FULL)


def test_the_control_and_what_is_claimed_come_first_at_every_length() -> None:
    stages = study.plan(planned())
    results = [str(stage.result) for stage in stages]
    assert len(results) == len(set(results))
    trained = [each for each in results if each.endswith("/final")]
    assert trained[:2] == ["out/plain/final", "out/moving_yarn/final"]
    assert len(trained) == len(study.ARMS)
    readings = [each for each in results if "/evaluation/" in each]
    assert {Path(each).parts[1] for each in readings[:4]} == {"plain", "moving_yarn"}
    assert len(readings) == 2 * (len(study.ARMS) + 1)
    for each in results:
        if "/evaluation/" in each and "untrained" not in each:
            assert results.index(each.rpartition("/evaluation/")[0] + "/final") < results.index(each)


@pytest.mark.parametrize("arm", study.ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_training_and_differs_from_the_others_in_the_scaling_alone(arm: Arm) -> None:
    command = study.training(planned(), arm).command
    config = composed(*command[2:], "dry_run=true")
    assert (config.data.seq_len, config.optim.steps, config.engine.zero_stage) == (1024, 600, 0)
    own = {key.partition("=")[0] for key in command[2:] if key not in study.training(planned(), study.ARMS[0]).command}
    assert {key for key in own if not key.lstrip("+").startswith("scaling")} <= {"name", "output_dir"}


@pytest.mark.parametrize("windows", [study.NEAR, study.FAR])
@pytest.mark.parametrize("smoke", [False, True])
def test_readings_are_valid_and_score_the_same_tokens_in_every_arm(windows, smoke) -> None:
    wanted = [parse(study.reading(planned(smoke), arm, windows).command[3:]) for arm in (*study.ARMS, study.UNTRAINED)]
    assert len({(tuple(args.lengths), args.last_k, args.num_windows, args.seed) for args in wanted}) == 1
    assert max(wanted[0].lengths) == (2 if windows is study.NEAR else 4) * planned(smoke).numbers.context_len


def test_tables_are_written_from_what_has_been_read(tmp_path) -> None:
    made = study.Study(tmp_path, 600, "fp32", study.FULL)
    assert study.write_tables(made) == "\n"
    for arm, nll in ((study.ARMS[0], 2.0), (study.ARMS[1], 1.9)):
        write_evaluation(tmp_path / arm.name, nll, method=arm.methods[0], windows=study.NEAR.name)
    text = study.write_tables(made)
    assert f"percent above `{study.CONTROL}`" in text
    assert study.ARMS[1].label in text
    assert (tmp_path / "report" / "tables.md").read_text() == text
