"""Packing: splits the samples of one step into packs (microbatches) from their lengths and numbers of images alone.

A step always holds the same samples, whatever the parallel layout. The packs are a pure function of these
numbers, computed at each step, so that every rank gets the same packs without communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The length at which causal attention costs as much as the matrix products of the same tokens, 12 x hidden size
# (24 h^2 against 2 h s FLOP for each token and layer): hidden size 4096, that of a 7B model. The
# balance does not need the exact value, only that long samples cost a little more than their length.
_ATTENTION_LENGTH = 49_152.0


def pack_step(
    lengths: ArrayLike,
    capacity: int,
    multiple: int = 1,
    images: ArrayLike | None = None,
    max_images: int | None = None,
    image_work: float = 0.0,
    other_work: ArrayLike | None = None,
) -> list[list[int]]:
    """Split the samples of a step into packs of at most ``capacity`` tokens (and ``max_images`` images).

    The number of packs is the smallest multiple of ``multiple`` into which this algorithm fits the samples; packs are
    balanced by work (length, squared length and images). Samples with most work are taken first, and each is assigned
    to the pack with the least work that has room for its images. If a pack is then too long, samples are exchanged
    between it and shorter packs until all fit; if that fails, ``multiple`` more packs are tried.

    Args:
        lengths: [n] tokens of each sample, with the padding that the sample needs.
        capacity: tokens of a pack.
        multiple: number of packs that the layout takes at a time (data-parallel size, times the
            pipeline-parallel size under an interleaved schedule).
        images: [n] images of each sample, tile by tile; only used with ``max_images`` and ``image_work``.
        max_images: maximum images of a pack, which bounds the activations kept for images; None for no limit.
        image_work: of the front end for an image (`sample_work`).
        other_work: of each sample (`sample_work`).

    Returns:
        Packs, each a sorted list of positions in ``lengths``. A pack is empty only where there are more packs
        than samples. Equal arguments give equal packs on every machine.

    Raises:
        ValueError: a sample is longer than a pack or has more images, there is no sample, or an argument is invalid.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    work = sample_work(sizes, images, image_work, other_work)
    counts = np.zeros_like(sizes) if images is None or max_images is None else np.asarray(images, np.int64)
    image_limit = max_images or 1
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError("a step needs at least one sample, as a flat list of lengths")
    if capacity < 1 or multiple < 1:
        raise ValueError(f"capacity ({capacity}) and multiple ({multiple}) must be at least 1")
    if int(sizes.min()) < 1:
        raise ValueError(
            f"sample {int(sizes.argmin())} of the step has length {int(sizes.min())}; must be at least 1"
        )
    if int(sizes.max()) > capacity:
        raise ValueError(
            f"sample {int(sizes.argmax())} of the step has {int(sizes.max())} tokens and a pack holds {capacity}: "
            "raise --seq-length"
        )

    if int(counts.max()) > image_limit:
        raise ValueError(
            f"sample {int(counts.argmax())} of the step has {int(counts.max())} images and a pack holds {image_limit}: "
            "raise --max-images-per-pack"
        )

    fewest = max(-(-int(sizes.sum()) // capacity), -(-int(counts.sum()) // image_limit))
    count = -(-fewest // multiple) * multiple
    while True:
        packs = _balance(work, count, counts, image_limit)
        if packs and _make_fit(packs, sizes, capacity, counts, image_limit):
            return [sorted(pack) for pack in packs]
        count += multiple  # ends at the latest with one sample per pack


def assign_packs(
    packs: Sequence[list[int]],
    lengths: ArrayLike,
    ranks: int,
    images: ArrayLike | None = None,
    image_work: float = 0.0,
    other_work: ArrayLike | None = None,
) -> list[list[list[int]]]:
    """Assign the packs of a step to the data-parallel ranks: the same number and about the same work for each.

    The heaviest ``ranks`` packs are assigned first, one per rank; then the next heaviest, where the rank with the
    least work so far gets the heaviest. Packs that run at the same time on different ranks thus have similar work.

    Args:
        packs: result of :func:`pack_step`; their number is a multiple of ``ranks``.
        lengths, images, image_work, other_work: what was packed.
        ranks: data-parallel size.

    Returns:
        For each rank, its packs in the order in which it runs them.
    """
    if len(packs) % ranks:
        raise ValueError(f"{len(packs)} packs cannot be divided equally among {ranks} data-parallel ranks")
    work = sample_work(np.asarray(lengths, dtype=np.int64), images, image_work, other_work)
    pack_work = np.array([float(work[pack].sum()) for pack in packs])
    heaviest_first = np.argsort(-pack_work, kind="stable")
    assigned: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = np.zeros(ranks)
    for first in range(0, len(packs), ranks):
        chosen = heaviest_first[first : first + ranks]
        for rank, pack in zip(np.argsort(totals, kind="stable"), chosen, strict=True):
            assigned[rank].append(packs[pack])
            totals[rank] += pack_work[pack]
    return assigned


def sample_work(
    sizes: NDArray[np.int64],
    images: ArrayLike | None = None,
    image_work: float = 0.0,
    other_work: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """[n] cost of each sample, in tokens of matrix-product work: its length, its attention and its images' front end.

    Args:
        sizes: [n] tokens of each sample.
        images: [n] images of each sample; None where they cost nothing beside their tokens.
        image_work: cost of an image in the front end, in tokens of matrix-product work (`ModelFamily.image_work`).
        other_work: [n] what else each sample costs, such as its share of the objectives, in the same tokens.
    """
    work: NDArray[np.float64] = sizes * (1.0 + sizes / _ATTENTION_LENGTH)
    work = work if other_work is None else work + np.asarray(other_work, dtype=np.float64)
    return work if images is None else work + image_work * np.asarray(images, dtype=np.int64)


def _balance(
    work: NDArray[np.float64], count: int, images: NDArray[np.int64], image_limit: int
) -> list[list[int]] | None:
    """Assign samples to ``count`` packs, most work first, each to the pack with the least work that has room.

    Returns:
        The packs, or None if the images of a sample fit into no pack.
    """
    works, needed_images = work.tolist(), images.tolist()
    packs: list[list[int]] = [[] for _ in range(count)]
    image_counts = [0] * count
    least = [(0.0, pack) for pack in range(count)]  # a heap
    for sample in np.argsort(-work, kind="stable").tolist():
        full = []
        while least and image_counts[least[0][1]] + needed_images[sample] > image_limit:
            full.append(heapq.heappop(least))
        if not least:
            return None
        load, pack = least[0]
        packs[pack].append(sample)
        image_counts[pack] += needed_images[sample]
        heapq.heapreplace(least, (load + works[sample], pack))
        for entry in full:
            heapq.heappush(least, entry)
    return packs


def _make_fit(
    packs: list[list[int]],
    sizes: NDArray[np.int64],
    capacity: int,
    images: NDArray[np.int64],
    image_limit: int,
) -> bool:
    """Exchange samples in place until no pack is longer than ``capacity``; False if that fails.

    In each exchange the longest pack moves a sample to the shortest pack for which this brings the two lengths closer
    and keeps both within ``image_limit``; it gets a smaller sample, or none, in return. Each exchange lowers the sum
    of squared lengths, so the loop ends; at most as many exchanges as samples are tried.
    """
    lengths = np.array([sizes[pack].sum() for pack in packs], dtype=np.int64)
    image_counts = np.array([images[pack].sum() for pack in packs], dtype=np.int64)
    for _ in range(len(sizes)):
        longest = int(lengths.argmax())
        if lengths[longest] <= capacity:
            return True
        given, given_images = sizes[packs[longest]], images[packs[longest]]
        for other in np.argsort(lengths, kind="stable"):
            gap = lengths[longest] - lengths[other]
            taken, taken_images = np.append(sizes[packs[other]], 0), np.append(images[packs[other]], 0)
            change = given[:, None] - taken  # tokens moved by exchanging each pair
            moves = given_images[:, None] - taken_images
            fits = (image_counts[longest] - moves <= image_limit) & (
                image_counts[other] + moves <= image_limit
            )
            cost = np.where((change > 0) & (change < gap) & fits, np.abs(2 * change - gap), gap)
            best = int(cost.argmin())
            if cost.flat[best] < gap:
                give, take = divmod(best, len(taken))
                moved = packs[longest].pop(give)
                if take < len(packs[other]):
                    packs[longest].append(packs[other].pop(take))
                packs[other].append(moved)
                lengths[longest] -= change.flat[best]
                lengths[other] += change.flat[best]
                image_counts[longest] -= moves.flat[best]
                image_counts[other] += moves.flat[best]
                break
        else:
            return False
    return bool(lengths.max() <= capacity)
