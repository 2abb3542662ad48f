"""The device of a rank, by visible devices and launcher variables."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from clex_train.config.engine import EngineConfig
from clex_train.engine import deepspeed as engines
from clex_train.utils import distributed


@pytest.fixture
def rank(monkeypatch):
    """Return a function that sets the number of visible GPUs and the launcher's variables."""
    distributed._has_gpu_of_its_own.cache_clear()

    def set_rank(visible: int, **variables: str) -> None:
        # An earlier test in this process may have left a group of one rank.
        monkeypatch.setattr(distributed, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    yield set_rank
    distributed._has_gpu_of_its_own.cache_clear()


@pytest.mark.parametrize(
    ("visible", "variables", "index"),
    [
        (8, {"LOCAL_RANK": "3"}, 3),
        (8, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}, 3),
        (1, {}, 0),
        (1, {"LOCAL_RANK": "3"}, 0),
        (1, {"LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "3"}, 0),
        (1, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "3"}, 0),
    ],
)
def test_a_rank_uses_its_device_among_the_visible_ones(rank, visible, variables, index):
    rank(visible, **variables)
    assert distributed.device() == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("visible", "variables", "ranks"),
    [
        (2, {"LOCAL_RANK": "2"}, 3),
        (1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2),
        (1, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 2),
        (4, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, 8),
        (1, {"LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, 2),
    ],
)
def test_more_ranks_than_devices_are_refused_on_each_before_the_group_is_opened(rank, visible, variables, ranks):
    rank(visible, **variables)
    line = rf"^LOCAL_RANK={variables['LOCAL_RANK']}: {ranks} ranks on this machine, but {visible} visible GPU"
    with pytest.raises(ValueError, match=line):
        engines.open_process_group(EngineConfig())


@pytest.mark.parametrize("of_launcher", [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "2,3"}, {}])
def test_a_single_device_of_the_launcher_is_not_one_per_rank(rank, monkeypatch, of_launcher):
    rank(1, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="3")
    processes = [SimpleNamespace(environ=lambda: {"LOCAL_RANK": "1"}), SimpleNamespace(environ=lambda: of_launcher)]
    monkeypatch.setattr(psutil.Process, "parents", lambda process: processes)
    if of_launcher == {"CUDA_VISIBLE_DEVICES": "3"}:
        with pytest.raises(ValueError, match=r"^LOCAL_RANK=1: 2 ranks on this machine, but 1 visible GPU; start"):
            distributed.device()
    else:
        assert distributed.device() == torch.device("cuda", 0), "a wrapper has bound it"
