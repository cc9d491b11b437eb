from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eve.data.sampling.permutation import sample_order

SIZES = [*range(1, 66), 127, 128, 129, 1000, 4096, 4097, 50_000]


@pytest.mark.parametrize("seed", [0, 1234, -5, 1 << 70])
def test_every_epoch_visits_every_sample_once(seed: int) -> None:
    for size in SIZES:
        epochs = sample_order(np.arange(3 * size), size, seed).reshape(3, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all(), size


@given(
    size=st.integers(1, 1 << 40),
    seed=st.integers(0, 1 << 32),
    start=st.integers(0, 1 << 41),
    cut=st.integers(0, 64),
)
@settings(max_examples=50, deadline=None)
def test_large_sizes_are_in_range_distinct_and_independent_of_chunking(
    size: int, seed: int, start: int, cut: int
) -> None:
    positions = np.arange(start, start + 64)
    order = sample_order(positions, size, seed)
    assert order.dtype == np.int64
    assert order.min() >= 0 and order.max() < size
    epoch = positions // size
    assert len(set(zip(epoch.tolist(), order.tolist(), strict=True))) == 64
    parts = [sample_order(part, size, seed) for part in (positions[:cut], positions[cut:])]
    assert (np.concatenate(parts) == order).all()
    assert (sample_order(positions[::-1].reshape(8, 8), size, seed) == order[::-1].reshape(8, 8)).all()


def test_the_order_depends_on_seed_and_epoch() -> None:
    size = 1000
    first = sample_order(np.arange(size), size, seed=7)
    assert (first == sample_order(np.arange(size), size, seed=7)).all()
    for other in (
        sample_order(np.arange(size), size, seed=8),
        sample_order(np.arange(size, 2 * size), size, seed=7),
    ):
        assert (first == other).mean() < 0.02


def test_the_order_is_pinned() -> None:
    """A change here changes what every interrupted run trains on next."""
    assert sample_order(np.arange(12), 10, seed=42).tolist() == [9, 3, 4, 5, 0, 7, 1, 8, 6, 2, 8, 7]


def test_where_a_sample_goes_is_close_to_uniform() -> None:
    size, seeds = 10, 1000
    for position in (0, 9):
        counts = np.bincount(
            [sample_order(np.array([position]), size, seed)[0] for seed in range(seeds)], minlength=size
        )
        chi_square = ((counts - seeds / size) ** 2 / (seeds / size)).sum()
        assert chi_square < 33.7, counts  # one in ten thousand at 9 degrees of freedom


def test_neighbours_are_torn_apart() -> None:
    order = sample_order(np.arange(10_000), 10_000, seed=3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    assert sample_order(np.arange(3, 9), 5, seed=1, shuffle=False).tolist() == [3, 4, 0, 1, 2, 3]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="size must be"):
        sample_order(np.arange(3), 0, seed=1)
    with pytest.raises(ValueError, match="position -1 is negative"):
        sample_order(np.array([2, -1]), 5, seed=1)
    assert sample_order(np.arange(0), 5, seed=1).tolist() == []
