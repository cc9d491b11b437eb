"""Near hashes by buckets: against comparing each with each, however the buckets are cut and the work is halved."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_eve.curation import near_duplicates
from megatron_eve.curation.near_duplicates import MAX_DISTANCE, drop_near, near_pairs

Hashes = NDArray[np.uint64]


def flipped(random: np.random.Generator, hashes: Hashes, bits: int) -> Hashes:
    """The hashes with `bits` different bits changed."""
    places = random.random((len(hashes), 64)).argsort(axis=1)[:, :bits].astype(np.uint64)
    return hashes ^ (np.uint64(1) << places).sum(axis=1, dtype=np.uint64)


def some_hashes(seed: int = 0) -> Hashes:
    """Random ones, copies of them with 0 to 8 bits changed, and a dense group around one hash, in random order."""
    random = np.random.default_rng(seed)
    base = random.integers(0, 1 << 64, 60, dtype=np.uint64)
    copies = [flipped(random, base, bits) for bits in range(MAX_DISTANCE + 1)]
    dense = flipped(random, np.zeros(150, np.uint64), 5)
    return random.permutation(np.concatenate([base, *copies, dense]))


def one_by_one(hashes: Hashes, distance: int) -> list[int]:
    """The rule, a hash at a time."""
    of: list[int] = []
    for number, value in enumerate(hashes):
        kept = [other for other in range(number) if of[other] < 0]
        near = [other for other in kept if int(hashes[other] ^ value).bit_count() <= distance]
        of.append(near[0] if near else -1)
    return of


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 6])
def test_dropped_are_those_near_an_earlier_kept_one(distance: int) -> None:
    hashes = some_hashes()
    expected = one_by_one(hashes, distance)
    assert drop_near(hashes, distance).tolist() == expected
    assert 0 < sum(of >= 0 for of in expected) < len(hashes)


@pytest.mark.parametrize("most", [0, 1, 50, 300])
def test_halving_where_pairs_are_many_changes_nothing(most: int) -> None:
    hashes = some_hashes(1)
    assert sum(len(one) for one, _ in near_pairs(np.unique(hashes), 4)) > 300
    assert drop_near(hashes, 4, max_pairs=most).tolist() == one_by_one(hashes, 4)


@pytest.mark.parametrize("blocks_in_key", [1, 2, 3, None])
@pytest.mark.parametrize("size", [7, 1 << 18])
def test_every_near_pair_is_found_once(
    blocks_in_key: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "_SLICE", size)  # a bucket may go on beyond its slice
    hashes = np.unique(some_hashes(2))
    np.random.default_rng(0).shuffle(hashes)
    bits = np.bitwise_count(hashes[:, None] ^ hashes)
    one, other = np.nonzero(np.triu(bits <= 3, 1))
    expected = sorted(zip(one.tolist(), other.tolist(), strict=True))
    parts = near_pairs(hashes, 3, blocks_in_key=blocks_in_key)
    found = [pair for part in parts for pair in zip(part[0].tolist(), part[1].tolist(), strict=True)]
    assert len(expected) > 100
    assert sorted(found) == expected


def test_a_chain_is_no_group() -> None:
    # Each is near the next, at 3 bits. The second is dropped for the first; the third is near none that is kept.
    chain = np.array([0, 0b111, 0b111_111, 0b111_111_111], np.uint64)
    assert drop_near(chain, 3).tolist() == [-1, 0, -1, 2]
    assert drop_near(chain[[1, 0, 2, 3]], 3).tolist() == [-1, 0, 0, -1]


def test_the_earliest_kept_one_is_named_even_if_another_is_nearer() -> None:
    hashes = np.array([0b1111_0000, 0b0000_0001, 0b0000_0000, 0b1111_0000], np.uint64)
    assert drop_near(hashes, 4).tolist() == [-1, -1, 0, 0]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes(count: int) -> None:
    assert drop_near(np.zeros(count, np.uint64), 6).tolist() == [-1, 0][:count]


@pytest.mark.parametrize("distance", [-1, MAX_DISTANCE + 1])
def test_a_distance_out_of_range_is_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to 8 bits"):
        drop_near(np.zeros(2, np.uint64), distance)
