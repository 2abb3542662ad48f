"""The all-reduce of per-step values: loss, stop flag, ODE gradient and row indices."""

import pytest
import torch

from clex_train.training.step_reduce import all_reduce_step
from clex_train.utils import distributed

LOSSES = [torch.tensor(1.5), torch.tensor(2.5)]
NOTHING = torch.zeros(0, dtype=torch.float64)


def test_a_single_rank_gets_its_values_bitwise():
    gradient = torch.tensor([1 / 3, -2e-300, 7e200], dtype=torch.float64)
    reduced = all_reduce_step(LOSSES, False, torch.tensor([9, 4]), gradient)()
    assert reduced.loss == 2.0
    assert not reduced.stop_requested
    assert torch.equal(reduced.gradient, gradient)
    assert reduced.rows.tolist() == [9, 4]


def test_no_gradient_is_reduced_without_one():
    assert all_reduce_step(LOSSES, False, torch.tensor([0]), NOTHING)().gradient.shape == (0,)


@pytest.fixture
def second_of_three(monkeypatch):
    """Make this process rank 1 of 3, with given sums of the two others."""
    others = {}

    def all_reduce(tensor):
        return tensor + others["sum"]

    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "all_reduce_sum", all_reduce)
    return others


def test_means_are_over_ranks_and_rows_are_in_order_of_ranks(second_of_three):
    # The loss, two components of the gradient, the stop flag, and the rows of ranks 0 and 2.
    second_of_three["sum"] = torch.tensor([7.0, 1.0, 2.0, 0.0, 11, 12, 0, 0, 2**40, 2**40 + 1], dtype=torch.float64)
    reduced = all_reduce_step(LOSSES, False, torch.tensor([3, 2**52]), torch.tensor([2.0, 4.0], dtype=torch.float64))()
    assert reduced.loss == 3.0
    assert reduced.gradient.tolist() == [1.0, 2.0]
    assert reduced.rows.tolist() == [11, 12, 3, 2**52, 2**40, 2**40 + 1]
    assert not reduced.stop_requested


def test_a_stop_request_of_one_rank_reaches_all(second_of_three):
    second_of_three["sum"] = torch.zeros(5, dtype=torch.float64)
    assert all_reduce_step(LOSSES, True, torch.tensor([0]), NOTHING)().stop_requested


def test_a_non_finite_loss_does_not_affect_rows_or_flags(second_of_three):
    second_of_three["sum"] = torch.zeros(5, dtype=torch.float64)
    reduced = all_reduce_step([torch.tensor(float("nan"))], False, torch.tensor([8]), NOTHING)()
    assert reduced.loss != reduced.loss
    assert not reduced.stop_requested
    assert reduced.rows.tolist() == [0, 8, 0]
