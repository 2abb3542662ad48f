"""The device of a rank follows what is visible to it."""

import pytest
import torch

from clex_train import distributed


@pytest.fixture
def rank(monkeypatch):
    """Sets how many GPUs a rank sees and what its launcher tells it."""

    def put(visible: int, **variables: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


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
def test_a_rank_takes_its_own_of_the_devices_that_it_sees(rank, visible, variables, index):
    rank(visible, **variables)
    assert distributed.device() == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("visible", "variables"),
    [
        (2, {"LOCAL_RANK": "2"}),
        (1, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}),
        (1, {"LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}),
    ],
)
def test_more_ranks_than_devices_are_refused(rank, visible, variables):
    rank(visible, **variables)
    with pytest.raises(ValueError, match=rf"LOCAL_RANK={variables['LOCAL_RANK']}: {visible} GPUs are visible"):
        distributed.device()
