"""The computed permutation: a bijection of any size that depends on its key and mixes well."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clex_train.data.permutation import Permutation
from clex_train.utils.seeding import generator


def permutation(size: int, seed: int = 0) -> Permutation:
    return Permutation(size, generator(seed, "test"))


@pytest.mark.parametrize("size", [*range(1, 67), 99, 100, 101, 255, 256, 257, 1023, 4097, 9973, 20000])
def test_every_size_gives_a_bijection(size: int) -> None:
    image = permutation(size, seed=size)
    assert sorted(image(i) for i in range(size)) == list(range(size))


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_any_size_and_seed_give_a_bijection(size: int, seed: int) -> None:
    image = permutation(size, seed)
    assert sorted(image(i) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [10**9, 10**12 + 39, 2**62 + 1])
def test_huge_sizes_give_distinct_images_in_range_quickly(size: int) -> None:
    image = permutation(size)
    start = time.process_time()
    images = [image(i) for i in range(2000)] + [image(size - 1 - i) for i in range(2000)]
    assert time.process_time() - start < 2.0, "half a millisecond each would be far too slow"
    assert len(set(images)) == 4000
    assert min(images) >= 0
    assert max(images) < size


def test_different_seeds_give_different_orders() -> None:
    orders = {tuple(permutation(50, seed)(i) for i in range(50)) for seed in range(20)}
    assert len(orders) == 20


def test_images_are_spread_evenly_and_neighbours_are_separated() -> None:
    size, cells = 100_000, 50
    image = permutation(size)
    first = np.array([image(i) for i in range(10_000)])
    counts = np.bincount(first * cells // size, minlength=cells)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 95, "49 degrees of freedom: beyond 95 with probability 1e-4"
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.05
    assert (np.abs(np.diff(first)) < 10).mean() < 0.002


def test_displacements_match_those_of_a_random_permutation() -> None:
    """Compare with a uniformly random permutation, which has one fixed point on average for every n."""
    fixed = [sum(permutation(40, seed)(i) == i for i in range(40)) for seed in range(400)]
    assert 0.8 < np.mean(fixed) < 1.2


def test_size_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        permutation(0)
