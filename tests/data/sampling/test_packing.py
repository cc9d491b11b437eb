from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eve.data.sampling.packing import assign_packs, pack_step, sample_work


def photo_lengths(count: int, seed: int) -> np.ndarray:
    """Tokens of captioned photos at 672 pixels."""
    random = np.random.default_rng(seed)
    image = random.choice([351, 401, 409, 451, 457, 601], count)
    return image + random.lognormal(np.log(130), 0.45, count).astype(np.int64)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    capacity=st.integers(50, 200),
    multiple=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_packs_hold_every_sample_once_within_capacity(
    lengths: list[int], capacity: int, multiple: int
) -> None:
    packs = pack_step(lengths, capacity, multiple)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in pack) <= capacity for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert len(packs) % multiple == 0
    assert sum(not pack for pack in packs) == max(0, len(packs) - len(lengths))
    assert packs == pack_step(np.array(lengths), capacity, multiple)
    # Two packs that fit into one would be one too many; this holds for every packing that does not waste.
    assert len(packs) < 2 * sum(lengths) / capacity + 1 + multiple


@given(
    samples=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=40),
    capacity=st.integers(50, 200),
    room=st.integers(3, 8),
    multiple=st.integers(1, 4),
)
@settings(max_examples=200, deadline=None)
def test_packs_hold_no_more_images_than_allowed(
    samples: list[tuple[int, int]], capacity: int, room: int, multiple: int
) -> None:
    lengths, images = zip(*samples, strict=True)
    packs = pack_step(lengths, capacity, multiple, images, room)
    assert sorted(sample for pack in packs for sample in pack) == list(range(len(lengths)))
    assert all(sum(lengths[sample] for sample in pack) <= capacity for pack in packs)
    assert all(sum(images[sample] for sample in pack) <= room for pack in packs)
    assert len(packs) % multiple == 0
    assert packs == pack_step(lengths, capacity, multiple, images, room)
    # A cap that is never met changes nothing.
    assert pack_step(lengths, capacity, multiple, images, sum(images) + 1) == pack_step(
        lengths, capacity, multiple
    )


def test_a_cap_on_images_is_met_with_as_few_packs_as_it_takes() -> None:
    lengths, images = [10] * 12, [1] * 8 + [0] * 4
    packs = pack_step(lengths, 1000, 1, images, 3)
    assert len(packs) == 3  # eight images in threes
    assert sorted(len(pack) for pack in packs) == [4, 4, 4]
    with pytest.raises(
        ValueError, match=r"sample 1 of the step has 5 images and a pack holds 4.*--max-images-per-pack"
    ):
        pack_step([10, 10], 100, 1, [0, 5], 4)


def test_as_few_packs_as_fit() -> None:
    assert sorted(pack_step([3, 3, 2, 2, 2], 6)) == [
        [0, 1],
        [2, 3, 4],
    ]  # longest first alone would need three
    assert len(pack_step([5, 5, 5], 10)) == 2
    assert len(pack_step([5, 5, 5], 10, multiple=4)) == 4
    assert pack_step([7], 10, multiple=3) == [[0], [], []]


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_a_published_step_is_nearly_full_balanced_and_fast(multiple: int) -> None:
    seconds = []
    for seed in range(5):
        lengths = photo_lengths(512, seed)
        start = time.perf_counter()
        packs = pack_step(lengths, 8192, multiple)
        seconds.append(time.perf_counter() - start)
        tokens = [int(lengths[pack].sum()) for pack in packs]
        fewest = -(-int(lengths.sum()) // 8192)
        assert len(packs) == -(-fewest // multiple) * multiple
        assert max(tokens) < 1.04 * np.mean(tokens)
    assert min(seconds) < 0.05  # a few milliseconds on a quiet machine


def test_long_samples_weigh_more_than_their_length() -> None:
    """Equal tokens are not equal work: the pack of one long sample gets fewer of the short ones."""
    lengths = [20_000, *[100] * 400]
    packs = pack_step(lengths, 40_000, multiple=2)
    with_long = next(pack for pack in packs if 0 in pack)
    other = next(pack for pack in packs if 0 not in pack)
    assert sum(lengths[s] for s in with_long) < 0.8 * sum(lengths[s] for s in other)


@pytest.mark.parametrize("image_work", [45.0, 400.0])
def test_images_weigh_what_their_front_end_costs(image_work: float) -> None:
    """Packs that run at the same time have equal work, where equal tokens alone leave some with more images."""
    random = np.random.default_rng(7)
    images = random.integers(0, 7, 256)
    images[random.random(256) < 0.5] = 0
    lengths = 196 * images + random.integers(20, 900, 256)

    def spread(counted: float) -> float:
        packs = pack_step(lengths, 8192, 8, images, image_work=counted)
        assert sorted(sample for pack in packs for sample in pack) == list(range(256))
        assigned = assign_packs(packs, lengths, 4, images, counted)
        work = sample_work(lengths, images, image_work)
        seconds = sum(max(work[pack].sum() for pack in turn) for turn in zip(*assigned, strict=True))
        return float(4 * seconds / work.sum() - 1)

    assert spread(image_work) < 0.002 and spread(0.0) > 0.02


def test_without_a_cost_of_images_packs_are_as_they_were() -> None:
    """Bit for bit: runs of families whose front end is small do not change."""
    lengths, images = photo_lengths(512, 3), np.random.default_rng(1).integers(0, 5, 512)
    assert np.array_equal(sample_work(lengths), sample_work(lengths, images, 0.0))
    packs = pack_step(lengths, 8192, 4)
    assert packs == pack_step(lengths, 8192, 4, images, image_work=0.0)
    assert assign_packs(packs, lengths, 4) == assign_packs(packs, lengths, 4, images, 0.0)


def test_a_sample_that_fits_no_pack_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"sample 1 of the step has 101 tokens and a pack holds 100.*--seq-length"
    ):
        pack_step([5, 101, 3], 100)


@pytest.mark.parametrize(
    ("lengths", "capacity", "multiple"), [([], 9, 1), ([3], 0, 1), ([3], 9, 0), ([3, 0], 9, 1)]
)
def test_senseless_arguments(lengths: list[int], capacity: int, multiple: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        pack_step(lengths, capacity, multiple)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_rank_gets_the_same_number_of_packs_and_the_same_work(ranks: int) -> None:
    lengths = photo_lengths(512, seed=1)
    packs = pack_step(lengths, 8192, multiple=8)
    assigned = assign_packs(packs, lengths, ranks)
    assert sorted(map(tuple, packs)) == sorted(tuple(pack) for rank_packs in assigned for pack in rank_packs)
    assert {len(rank_packs) for rank_packs in assigned} == {len(packs) // ranks}
    tokens = [sum(int(lengths[pack].sum()) for pack in rank_packs) for rank_packs in assigned]
    assert max(tokens) < 1.01 * np.mean(tokens)


def test_empty_packs_are_dealt_too() -> None:
    assigned = assign_packs(pack_step([7, 5], 10, multiple=4), [7, 5], ranks=4)
    assert assigned == [[[0]], [[1]], [[]], [[]]]
    with pytest.raises(ValueError, match="3 packs cannot be divided equally among 2"):
        assign_packs([[0], [1], [2]], [1, 1, 1], 2)
