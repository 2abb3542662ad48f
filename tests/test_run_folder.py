"""The run folder refuses what it cannot hold or continue, naming the key."""

import pytest

from clex_train import run_folder
from clex_train.config import Config, Resume


def _config(folder, **optim):
    config = Config(output_dir=str(folder))
    for key, value in optim.items():
        setattr(config.optim, key, value)
    return config


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir=.*cannot be written"):
        run_folder.require_writable(tmp_path / "file" / "run")


def test_a_changed_learning_rate_is_refused_on_resume_and_named(tmp_path):
    run_folder.write_config(_config(tmp_path))
    with pytest.raises(ValueError, match=r"^optim\.lr: differs from .*config\.yaml"):
        run_folder.check_config(_config(tmp_path, lr=1.0), has_checkpoint=True)


def test_keys_that_do_not_touch_the_numbers_may_change(tmp_path):
    run_folder.write_config(_config(tmp_path))
    changed = _config(tmp_path)
    changed.evaluation.every, changed.tracking.log_every, changed.checkpoint.keep_last = 5, 7, 3
    changed.launch.nodes, changed.model.config = 9, "elsewhere/the/same"
    run_folder.check_config(changed, has_checkpoint=True)


def test_rows_may_be_shared_out_otherwise_on_another_number_of_ranks_alone(tmp_path):
    run_folder.write_config(_config(tmp_path))
    changed = _config(tmp_path)
    changed.engine.micro_batch = 4
    run_folder.check_config(changed, has_checkpoint=True, other_ranks=True)
    with pytest.raises(ValueError, match=r"^engine\.micro_batch: differs"):
        run_folder.check_config(changed, has_checkpoint=True)


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path):
    config = _config(tmp_path)
    config.resume = Resume.never
    with pytest.raises(ValueError, match="resume=never"):
        run_folder.check_config(config, has_checkpoint=True)


def test_a_key_that_the_program_has_learned_since_is_no_change(tmp_path):
    config = _config(tmp_path)
    run_folder.write_config(config)
    path = tmp_path / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "max_bad_steps" not in line))
    run_folder.check_config(config, has_checkpoint=True)
