"""The choice of a back end: contradictions are refused, and what earlier versions wrote still means the same."""

import pytest
from omegaconf import OmegaConf

from clex_train.config.root import Config
from clex_train.config.tracking import BackEnd, TrackingConfig, Wandb
from clex_train.tracking import run_folder, saved_config
from clex_train.tracking.back_ends import LIBRARIES
from clex_train.utils.errors import ConfigError
from tests.helpers.composing import composed


def test_every_back_end_but_local_has_a_library():
    assert {*LIBRARIES} == {*BackEnd} - {BackEnd.local}


@pytest.mark.parametrize(
    ("option", "back_end", "mode"),
    [
        ("wandb", BackEnd.wandb, None),
        ("offline", BackEnd.wandb, Wandb.offline),
        ("online", BackEnd.wandb, Wandb.online),
        ("tensorboard", BackEnd.tensorboard, None),
        ("trackio", BackEnd.trackio, None),
        ("local", BackEnd.local, None),
    ],
)
def test_each_option_selects_its_back_end(option, back_end, mode):
    tracking = composed("+experiment=tiny_base", f"tracking={option}").tracking
    assert (tracking.back_end, tracking.wandb) == (back_end, mode)


def test_off_is_an_older_name_of_local():
    assert composed("+experiment=tiny_base", "tracking=wandb", "tracking.wandb=off").tracking.back_end is BackEnd.local
    assert composed("+experiment=tiny_base", "tracking.wandb=off").tracking.back_end is BackEnd.local


@pytest.mark.parametrize("name", [BackEnd.tensorboard, BackEnd.trackio, BackEnd.local])
@pytest.mark.parametrize("mode", [Wandb.online, Wandb.offline])
def test_a_mode_of_wandb_is_refused_where_wandb_gets_nothing(name, mode):
    with pytest.raises(ConfigError, match=rf"tracking\.wandb={mode.value}: is a mode of tracking=wandb"):
        TrackingConfig(name=name, wandb=mode)


def test_a_space_is_refused_without_trackio():
    with pytest.raises(ConfigError, match=r"tracking\.space=a/b: needs tracking=trackio"):
        TrackingConfig(space="a/b")


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"tracking\.peak_tflops=0: more than 0"):
        TrackingConfig(peak_tflops=0)


@pytest.mark.parametrize(("mode", "back_end"), [("offline", BackEnd.wandb), ("off", BackEnd.local)])
def test_a_run_folder_from_before_there_were_others_resumes_with_any_back_end(tmp_path, mode, back_end):
    now = Config(output_dir=str(tmp_path), tracking=TrackingConfig(name=BackEnd.tensorboard))
    recorded = OmegaConf.create(run_folder.as_yaml(now))
    recorded.tracking = {"wandb": mode, "project": "clex-train", "log_every": 1}
    OmegaConf.save(recorded, tmp_path / "config.yaml")
    run_folder.check_config(now, has_checkpoint=True)
    assert saved_config.read(tmp_path / "config.yaml").tracking.back_end is back_end
