"""Detection of loss spikes, and the rows skipped for them."""

import math

from clex_train.resilience.loss_spikes import SpikeWatch


def test_no_loss_is_a_spike_without_a_history():
    watch = SpikeWatch(factor=3.0, window=100)
    assert not any(watch.is_spike(10.0**power) for power in range(10))


def test_the_limit_follows_from_the_median_and_the_mad():
    watch = SpikeWatch(factor=4.0, window=5)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
        watch.is_spike(loss)
    assert watch.limit() == 3.0 + 4.0 * 1.0
    assert not watch.is_spike(7.0)
    assert watch.losses == [2.0, 3.0, 4.0, 5.0, 7.0]
    assert watch.is_spike(8.1)
    assert watch.losses[-1] == 7.0, "a spike is not what later losses are measured against"


def test_a_non_finite_loss_is_not_a_spike_and_not_recorded():
    watch = SpikeWatch(factor=4.0, window=3)
    assert not watch.is_spike(math.nan)
    assert watch.losses == []


def test_equal_losses_still_tolerate_a_small_increase():
    watch = SpikeWatch(factor=10.0, window=3)
    for _ in range(3):
        watch.is_spike(2.0)
    assert not watch.is_spike(2.01)
    assert watch.is_spike(2.1)


def test_skipped_rows_merge_into_disjoint_ranges_and_survive_a_checkpoint():
    watch = SpikeWatch(factor=10.0, window=3)
    watch.skip([4, 5])
    watch.skip([8, 9])
    watch.skip([6, 7])
    assert watch.skipped == [(4, 10)]
    again = SpikeWatch(factor=10.0, window=3)
    again.load_state_dict(watch.state_dict())
    assert (again.skipped, again.roll_backs) == ([(4, 10)], 3)
