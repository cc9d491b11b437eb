"""Lengths to packs: the samples of one step, split into microbatches from their lengths alone.

The batch unit is the sample: a step always holds the same samples, whatever the layout. How they are grouped is
decided here, at step time, as a pure function of their lengths, so that every rank comes to the same answer
without a message.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The length at which causal attention costs as much as the matrix products of the same tokens, 12 x hidden size
# (24 h^2 against 2 h s FLOP for each token and layer): hidden size 4096, that of EVE-7B. Balance does not depend
# on it being exact; it only has to say that long samples are a little dearer than their length.
_ATTENTION_LENGTH = 49_152.0


def pack_step(
    lengths: ArrayLike,
    capacity: int,
    multiple: int = 1,
    images: ArrayLike | None = None,
    most_images: int | None = None,
) -> list[list[int]]:
    """Splits the samples of a step into packs of at most ``capacity`` tokens (and ``most_images`` images).

    The number of packs is the smallest multiple of ``multiple`` that the samples are found to fit into; within
    that number they are balanced by work (length and squared length). Longest sample first, each goes into the
    pack with the least work so far that has room for its images; where a pack has become too long, samples are
    exchanged between it and shorter ones until all fit; where they cannot be made to, there are ``multiple`` packs
    more.

    Args:
        lengths: [n] tokens of each sample, with whatever padding each sample needs.
        capacity: tokens of a pack.
        multiple: number of packs that the layout consumes at a time (data-parallel size, times the
            pipeline-parallel size under an interleaved schedule).
        images: [n] images of each sample; wanted with ``most_images`` only.
        most_images: images that a pack may hold, which bounds what the model keeps of them; None does not
            bound it.

    Returns:
        Packs, each a sorted list of positions in ``lengths``. A pack is empty only where there are more packs
        than samples. Equal arguments give equal packs on every machine.

    Raises:
        ValueError: a sample that is longer than a pack or has more images, no sample, or a senseless argument.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    counts = np.zeros_like(sizes) if images is None or most_images is None else np.asarray(images, np.int64)
    room = most_images or 1
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError("a step needs at least one sample, as a flat list of lengths")
    if capacity < 1 or multiple < 1:
        raise ValueError(f"capacity ({capacity}) and multiple ({multiple}) must be at least 1")
    if int(sizes.min()) < 1:
        raise ValueError(
            f"sample {int(sizes.argmin())} of the step has length {int(sizes.min())}; at least 1 is due"
        )
    if int(sizes.max()) > capacity:
        raise ValueError(
            f"sample {int(sizes.argmax())} of the step has {int(sizes.max())} tokens and a pack holds {capacity}: "
            "raise --seq-length"
        )

    if int(counts.max()) > room:
        raise ValueError(
            f"sample {int(counts.argmax())} of the step has {int(counts.max())} images and a pack holds {room}: "
            "raise --max-images-per-pack"
        )

    fewest = max(-(-int(sizes.sum()) // capacity), -(-int(counts.sum()) // room))
    count = -(-fewest // multiple) * multiple
    while True:
        packs = _balance(sizes, count, counts, room)
        if packs and _make_fit(packs, sizes, capacity, counts, room):
            return [sorted(pack) for pack in packs]
        count += multiple  # ends at one sample a pack at the latest


def deal_packs(packs: Sequence[list[int]], lengths: ArrayLike, ranks: int) -> list[list[list[int]]]:
    """Deals the packs of a step to the data-parallel ranks, the same number and about the same work to each.

    The heaviest ``ranks`` packs are dealt first, one to a rank, then the next ones to the ranks in the order of
    the least work so far. Packs that run at the same time on different ranks are therefore neighbours in weight.

    Args:
        packs: result of :func:`pack_step`; their number is a multiple of ``ranks``.
        lengths: [n] the lengths that were packed.
        ranks: data-parallel size.

    Returns:
        For each rank, its packs in the order in which it runs them.
    """
    if len(packs) % ranks:
        raise ValueError(f"{len(packs)} packs cannot be dealt equally to {ranks} data-parallel ranks")
    work = sample_work(np.asarray(lengths, dtype=np.int64))
    pack_work = np.array([float(work[pack].sum()) for pack in packs])
    heaviest_first = np.argsort(-pack_work, kind="stable")
    hands: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = np.zeros(ranks)
    for first in range(0, len(packs), ranks):
        dealt = heaviest_first[first : first + ranks]
        for rank, pack in zip(np.argsort(totals, kind="stable"), dealt, strict=True):
            hands[rank].append(packs[pack])
            totals[rank] += pack_work[pack]
    return hands


def sample_work(sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] cost of each sample in tokens of matrix-product work: its length, and its share of attention."""
    return sizes * (1.0 + sizes / _ATTENTION_LENGTH)


def _balance(
    sizes: NDArray[np.int64], count: int, images: NDArray[np.int64], room: int
) -> list[list[int]] | None:
    """Deals the samples to ``count`` packs, longest first, each to the one with the least work that has room.

    Returns:
        The packs, or None where a sample's images found room in none of them.
    """
    work, wants = sample_work(sizes).tolist(), images.tolist()
    packs: list[list[int]] = [[] for _ in range(count)]
    held = [0] * count
    least = [(0.0, pack) for pack in range(count)]  # a heap
    for sample in np.argsort(-sizes, kind="stable").tolist():
        full = []
        while least and held[least[0][1]] + wants[sample] > room:
            full.append(heapq.heappop(least))
        if not least:
            return None
        load, pack = least[0]
        packs[pack].append(sample)
        held[pack] += wants[sample]
        heapq.heapreplace(least, (load + work[sample], pack))
        for entry in full:
            heapq.heappush(least, entry)
    return packs


def _make_fit(
    packs: list[list[int]], sizes: NDArray[np.int64], capacity: int, images: NDArray[np.int64], room: int
) -> bool:
    """Exchanges samples, in place, until no pack is longer than ``capacity``; False where that does not work out.

    The longest pack gives a sample, for a smaller one or for none, to the shortest pack with which that evens
    the two out and leaves both with room for their images. Each exchange lowers the sum of squares, so it ends; as
    many as there are samples are tried.
    """
    lengths = np.array([sizes[pack].sum() for pack in packs], dtype=np.int64)
    held = np.array([images[pack].sum() for pack in packs], dtype=np.int64)
    for _ in range(len(sizes)):
        longest = int(lengths.argmax())
        if lengths[longest] <= capacity:
            return True
        given, given_images = sizes[packs[longest]], images[packs[longest]]
        for other in np.argsort(lengths, kind="stable"):
            gap = lengths[longest] - lengths[other]
            taken, taken_images = np.append(sizes[packs[other]], 0), np.append(images[packs[other]], 0)
            change = given[:, None] - taken  # tokens that the exchange of each pair moves
            moves = given_images[:, None] - taken_images
            fits = (held[longest] - moves <= room) & (held[other] + moves <= room)
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
                held[longest] -= moves.flat[best]
                held[other] += moves.flat[best]
                break
        else:
            return False
    return bool(lengths.max() <= capacity)
