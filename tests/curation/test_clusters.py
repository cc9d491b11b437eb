"""The maths of clusters, against plain references."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_eve.curation.clusters import (
    CHOSEN,
    NearestCentre,
    NearestRows,
    evenly_spaced,
    sample_numbers,
    train_centres,
    unit_length,
)


def directions(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return unit_length(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


def test_nearest_centre_is_that_of_all_cosines_in_float64() -> None:
    centres, vectors = directions(50, 32), directions(400, 32, seed=1).astype(np.float16)
    found, distances = NearestCentre(centres)(vectors)
    cosines = unit_length(vectors).astype(np.float64) @ centres.T.astype(np.float64)
    assert (found == cosines.argmax(1)).all()
    np.testing.assert_allclose(distances, 1 - cosines.max(1), atol=1e-7)


def test_nearest_centres_do_not_depend_on_the_cut_into_shards() -> None:
    # With these sizes the products of a matrix do depend on where in it a vector stands.
    centres, vectors = directions(1000, 768), directions(3000, 768, seed=1).astype(np.float16)
    nearest = NearestCentre(centres)
    whole = nearest(vectors)
    for cuts in ([5], [1000, 1003, 2221], [700, 701, 702, 703, 704]):
        parts = [nearest(part) for part in np.split(vectors, cuts)]
        for number in (0, 1):
            assert np.array_equal(np.concatenate([part[number] for part in parts]), whole[number])


def test_the_first_of_equal_centres_is_taken() -> None:
    centre = directions(1, 8)
    found, distances = NearestCentre(np.concatenate([-centre, centre, centre]))(centre)
    assert found.tolist() == [1] and distances[0] < 1e-6


def test_no_vectors() -> None:
    found, distances = NearestCentre(directions(3, 8))(np.empty((0, 8), np.float16))
    assert found.shape == distances.shape == (0,)


def test_centres_are_those_of_separate_groups_and_repeat_with_the_seed() -> None:
    axes = np.eye(8, dtype=np.float32)[:5]
    kinds = np.repeat(np.arange(5), 40)
    points = unit_length(axes[kinds] + 0.05 * directions(200, 8))
    centres, cosines = train_centres(points, 5, rounds=20, seed=3)
    again, _ = train_centres(points, 5, rounds=20, seed=3)
    assert np.array_equal(centres, again)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, atol=1e-6)
    assert cosines == sorted(cosines) and cosines[-1] > 0.99
    found, _ = NearestCentre(centres)(points)
    assert all(len(set(found[kinds == kind])) == 1 for kind in range(5))


@pytest.mark.parametrize("per_centre", [1, 7, 1000])
def test_nearest_rows_are_those_of_one_sort_over_all(per_centre: int) -> None:
    random = np.random.default_rng(0)
    tables = []
    for shard, count in enumerate([4000, 0, 9000, 500, 7000]):
        table = np.zeros(count, CHOSEN)
        table["shard"], table["row"] = shard, np.arange(count)
        table["centre"] = random.integers(0, 12, count) ** 2 % 13  # some centres have none
        table["distance"] = np.round(random.random(count), 2)  # many are equal
        tables.append(table)
    nearest = NearestRows(13, per_centre)
    for table in tables:
        nearest.add(table)
    everything = np.concatenate(tables)
    everything = everything[np.lexsort([everything[key] for key in ("row", "shard", "distance", "centre")])]
    expected = [everything[everything["centre"] == centre][:per_centre] for centre in range(13)]
    assert np.array_equal(nearest.result(), np.concatenate(expected))


def test_nearest_rows_keep_no_more_than_they_may() -> None:
    nearest = NearestRows(10, 100)
    random = np.random.default_rng(0)
    most = 0
    for shard in range(200):
        table = np.zeros(1000, CHOSEN)
        table["shard"], table["row"] = shard, np.arange(1000)
        table["centre"], table["distance"] = random.integers(0, 10, 1000), random.random(1000)
        nearest.add(table)
        most = max(most, len(nearest._kept) + sum(map(len, nearest._waiting)))
    assert most <= 10 * 100 + 4096 + 1000
    assert len(nearest.result()) == 1000


def test_sample_is_of_different_numbers_that_the_seed_chooses() -> None:
    found = sample_numbers(1000, 100, seed=1)
    assert len(set(found)) == 100 and (np.diff(found) > 0).all() and found[0] >= 0 and found[-1] < 1000
    assert np.array_equal(found, sample_numbers(1000, 100, seed=1))
    assert not np.array_equal(found, sample_numbers(1000, 100, seed=2))
    assert np.array_equal(sample_numbers(7, 100, seed=1), np.arange(7))


def test_evenly_spaced() -> None:
    assert evenly_spaced(np.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly_spaced(np.arange(3), 20).tolist() == [0, 1, 2]
    assert evenly_spaced(np.arange(0), 20).tolist() == []
