"""Which of many 64-bit hashes are near an earlier one: all of them on one node, without comparing each with each.

Two hashes are near if at most `distance` of their bits differ. In their order, a hash is kept unless it is near one
that was kept before it. So no two kept hashes are near, each dropped one is near a kept one before it, and a chain of
hashes, each near the next, does not become one group of duplicates.

Near pairs are found by buckets (pigeonhole principle). The 64 bits are cut into `distance + r` blocks; two near hashes
are equal in at least r of them, since a bit that differs spoils one block. For each choice of r blocks the hashes are
sorted by these blocks, their key, and only hashes of equal keys are compared. No near pair is missed, whatever r is: a
larger r makes longer keys, so smaller buckets, of more choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_eve.curation.hashes import HASH_BITS

Hashes = NDArray[np.uint64]
Numbers = NDArray[np.int64]

MAX_DISTANCE = 8
"""Most bits in which near hashes may differ: the number of choices grows steeply with it."""
MAX_PAIRS = 1 << 27
"""Near pairs held in memory at a time (16 bytes each); if there are more, the hashes are decided in two halves."""
# Hashes that are compared at a time: the temporary arrays of a slice stay in the MB.
_SLICE = 1 << 18


class _Block(NamedTuple):
    """Adjacent bits of a hash."""

    low: int
    """Number of the lowest of them."""
    width: int


def drop_near(hashes: Hashes, distance: int, *, max_pairs: int = MAX_PAIRS) -> Numbers:
    """Decide for each hash whether it is kept, or dropped because it is near an earlier one that is kept.

    Args:
        hashes: [N]; of two near hashes the first is kept.
        distance: most bits in which near hashes differ, 0 to `MAX_DISTANCE`.
        max_pairs: near pairs held in memory at a time; the result does not depend on it.

    Returns:
        [N]: for a dropped hash, the number of the earliest kept hash that it is near; -1 for a kept hash.

    Raises:
        ValueError: `distance` is out of range.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance {distance}: it must be 0 to {MAX_DISTANCE} bits")
    # Only different hashes are compared: of equal ones, all are near the same hashes, and the later near the first.
    first, which = _different(hashes)
    near = np.full(len(first), -1, np.int64)
    if distance:
        _decide(hashes[first], distance, np.arange(len(first)), near, max_pairs)
    target = np.where(near < 0, first, first[near])
    of = target[which]
    of[first[near < 0]] = -1
    return of


def _different(hashes: Hashes) -> tuple[Numbers, Numbers]:
    """The different hashes in order of appearance.

    Returns:
        [V]: place of the first of each; [N]: number of each hash among the different ones.
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = ranked[1:] != ranked[:-1]
    first = order[new]  # by value
    by_place = np.argsort(first)
    number = np.empty_like(by_place)
    number[by_place] = np.arange(len(by_place))
    which = np.empty_like(order)
    which[order] = number[np.cumsum(new) - 1]
    return first[by_place], which


def _decide(hashes: Hashes, distance: int, members: Numbers, near: Numbers, max_pairs: int) -> None:
    """Decide the hashes of some numbers among themselves: `near` of each dropped one is set.

    Where they have more than `max_pairs` near pairs, the first half of them is decided, then those of the second half
    that are near a kept one of the first are dropped, then the rest of the second half is decided.

    Args:
        hashes: [V], all different.
        members: ascending numbers of hashes of which none is near a kept one outside them.
        near: [V], -1 so far for the members.
    """
    pairs = _collect(near_pairs(hashes[members], distance), max_pairs)
    if pairs is not None:
        dropped_by = _first_kept(len(members), *pairs)
        dropped = dropped_by >= 0
        near[members[dropped]] = members[dropped_by[dropped]]
        return
    first, second = np.split(members, [len(members) // 2])
    _decide(hashes, distance, first, near, max_pairs)
    kept = first[near[first] < 0]
    both = np.concatenate([kept, second])
    for one, other in near_pairs(hashes[both], distance):
        across = (one < len(kept)) & (other >= len(kept))
        _set_earliest(near, both[other[across]], both[one[across]])
    _decide(hashes, distance, second[near[second] < 0], near, max_pairs)


def _collect(pairs: Iterator[tuple[Numbers, Numbers]], most: int) -> tuple[Numbers, Numbers] | None:
    """All pairs in one array each; None as soon as there are more than `most`."""
    found: list[tuple[Numbers, Numbers]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    total = 0
    for one, other in pairs:
        total += len(one)
        if total > most:
            return None
        found.append((one, other))
    ones, others = zip(*found, strict=True)
    return np.concatenate(ones), np.concatenate(others)


def _first_kept(count: int, earlier: Numbers, later: Numbers) -> Numbers:
    """Of `count` hashes with all their near pairs, keep each that is not near a kept one before it.

    In each round, the hashes whose earlier neighbours are all dropped are kept and their later neighbours dropped.

    Returns:
        [count]: number of the earliest kept hash that a dropped one is near; -1 for a kept one.
    """
    dropped = np.zeros(count, bool)
    waiting = np.zeros(count, bool)
    one, other = earlier, later  # pairs of which both are undecided
    while len(one):
        waiting[other] = True
        kept = ~waiting[one]
        waiting[other] = False
        dropped[other[kept]] = True
        open_ = ~(dropped[one] | dropped[other] | kept)
        one, other = one[open_], other[open_]
    near = np.full(count, -1, np.int64)
    decisive = ~dropped[earlier]
    _set_earliest(near, later[decisive], earlier[decisive])
    return near


def _set_earliest(near: Numbers, dropped: Numbers, kept: Numbers) -> None:
    """Set `near[dropped]` to the lowest of what it is, if it is set, and the `kept` beside it."""
    unset = near[dropped] < 0
    near[dropped[unset]] = np.iinfo(np.int64).max
    np.minimum.at(near, dropped, kept)


def near_pairs(
    hashes: Hashes, distance: int, *, blocks_in_key: int | None = None
) -> Iterator[tuple[Numbers, Numbers]]:
    """All pairs of near hashes, each once.

    Args:
        hashes: [V], all different.
        distance: most bits in which near hashes differ, at least 1.
        blocks_in_key: r; default: the smallest of which the key has log2(V) bits, one bucket per hash.

    Yields:
        The lower and the higher numbers of some pairs.
    """
    order = np.argsort(hashes)
    ranked = hashes[order]
    r = blocks_in_key or _blocks_in_key(len(hashes), distance)
    blocks = _blocks(distance + r)
    for choice in combinations(range(len(blocks)), r):
        chosen = [blocks[number] for number in choice]
        # A pair that is equal in more than r blocks is yielded by the first choice of r of them alone.
        others = [blocks[number] for number in range(choice[-1]) if number not in choice]
        rest = [block for number, block in enumerate(blocks) if number not in choice]
        for one, other in _equal_keys(hashes, chosen, rest, distance):
            differences = one ^ other
            is_first = np.ones(len(one), bool)
            for block in others:
                is_first &= _bits(differences, block) != 0
            numbers = np.stack(
                [order[np.searchsorted(ranked, side[is_first])] for side in (one, other)]
            )  # (2, pairs)
            yield numbers.min(axis=0), numbers.max(axis=0)


def _blocks_in_key(count: int, distance: int) -> int:
    """The smallest number of blocks that makes a key of log2(count) bits."""
    bits = math.log2(max(count, 2))
    r = 1
    while HASH_BITS * r // (distance + r) < min(bits, HASH_BITS // 2):
        r += 1
    return r


def _blocks(count: int) -> list[_Block]:
    """Cut the bits of a hash into blocks of almost equal widths, from the highest bits on."""
    edges = [HASH_BITS * number // count for number in range(count, -1, -1)]
    return [_Block(low, high - low) for high, low in pairwise(edges)]


def _joined(blocks: Sequence[_Block]) -> list[_Block]:
    """The blocks, those that follow each other in a hash as one: fewer moves arrange them."""
    joined: list[_Block] = []
    for block in blocks:
        if joined and block.low + block.width == joined[-1].low:
            block = _Block(block.low, block.width + joined.pop().width)
        joined.append(block)
    return joined


def _bits(hashes: Hashes, block: _Block) -> Hashes:
    """The bits of a block, as the lowest bits."""
    return (hashes >> np.uint64(block.low)) & np.uint64((1 << block.width) - 1)


def _arranged(hashes: Hashes, blocks: Sequence[_Block]) -> Hashes:
    """The hashes with the bits of the blocks in this order, from the highest bit on."""
    result = np.zeros_like(hashes)
    for start in range(0, len(hashes), _SLICE):
        part = hashes[start : start + _SLICE]
        target = result[start : start + _SLICE]
        for block in blocks:
            target <<= np.uint64(block.width)
            target |= _bits(part, block)
    return result


def _put_back(arranged: Hashes, blocks: Sequence[_Block]) -> Hashes:
    """The inverse of `_arranged`."""
    result = np.zeros_like(arranged)
    low = HASH_BITS
    for block in blocks:
        low -= block.width
        result |= _bits(arranged, _Block(low, block.width)) << np.uint64(block.low)
    return result


def _equal_keys(
    hashes: Hashes, key: Sequence[_Block], rest: Sequence[_Block], distance: int
) -> Iterator[tuple[Hashes, Hashes]]:
    """The pairs of near hashes that are equal in all blocks of a key."""
    blocks = _joined([*key, *rest])
    table = _arranged(hashes, blocks)
    table.sort()
    # Two hashes of which the highest bits, the key, are equal differ by less.
    limit = np.uint64(1 << sum(block.width for block in rest))
    for start in range(0, len(table), _SLICE):
        one, other = _near_in_buckets(table, start, limit, distance)
        yield _put_back(one, blocks), _put_back(other, blocks)


def _near_in_buckets(table: Hashes, start: int, limit: np.uint64, distance: int) -> tuple[Hashes, Hashes]:
    """Compare each hash of a slice of a sorted table with those after it, to the end of its bucket."""
    found = [(table[:0], table[:0])]
    stop = min(start + _SLICE, len(table) - 1)
    # Most buckets end here, so the next hash is looked at without an index.
    left = start + np.flatnonzero((table[start:stop] ^ table[start + 1 : stop + 1]) < limit)
    step = 1
    while len(left):
        one, other = table[left], table[left + step]
        differences = one ^ other
        in_bucket = differences < limit
        near = np.flatnonzero(in_bucket & (np.bitwise_count(differences) <= distance))
        if len(near):
            found.append((one[near], other[near]))
        step += 1
        left = left[in_bucket]
        left = left[: np.searchsorted(left, len(table) - step)]
    ones, others = zip(*found, strict=True)
    return np.concatenate(ones), np.concatenate(others)
