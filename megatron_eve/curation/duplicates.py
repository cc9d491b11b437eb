"""Duplicates among the rows of all shards: which row is dropped, and of which one it is a copy.

Rows are in one order: the shards as they were given, and the rows of each. Of two copies the first is kept, so a source
that is named first wins. Exact copies have files of the same SHA-256; near copies have perceptual hashes that differ in
few bits (`near_duplicates.py` says which of several near rows are kept). Only rows with one picture are compared, and
only by this picture: rows with the same picture and other texts are copies, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import compute

from megatron_eve.curation.near_duplicates import Hashes, Numbers, drop_near

EXACT = "duplicate_exact"
"""Reason of a row whose picture is the same file as that of an earlier row."""
NEAR = "duplicate_near"
"""Reason of a row whose picture looks like that of an earlier row that is kept."""
COLUMNS = ("row", "reason", "sha256", "phash")
"""Columns of the table of the stage `filter` that are read."""
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("reason", pyarrow.string()),
        ("of_shard", pyarrow.int32()),
        ("of_row", pyarrow.int64()),
        ("distance", pyarrow.int32()),
    ]
)
"""The table of dropped rows: `of_shard` and `of_row` name the row of which it is a copy, `distance` the bits in which
their perceptual hashes differ (0 for exact copies)."""
PLAIN_BITS = 8
"""A perceptual hash with at most this many bits set does not tell one picture from another: the pictures of one colour
all have one bit or none, and those made of stripes only at most 8. They are compared by SHA-256 only."""

Digests = NDArray[np.uint64]


class Rows(NamedTuple):
    """The rows of all shards that are compared, in their order. N is their number, S that of the shards."""

    row: NDArray[np.uint32]
    """[N], number in its shard."""
    digest: Digests
    """[N, 4], SHA-256 of the picture's file."""
    phash: Hashes
    """[N], perceptual hash; 0 where there is none."""
    ends: Numbers
    """[S], where the rows of each shard end."""

    def shard_of(self, numbers: Numbers) -> Numbers:
        """The shards of some rows."""
        return np.searchsorted(self.ends, numbers, side="right")


class Copies(NamedTuple):
    """What was found of each of N rows."""

    of: Numbers
    """[N], number of the row of which it is a copy; -1 for a row that is kept."""
    exact: NDArray[np.bool_]
    """[N], it is an exact copy."""
    distance: NDArray[np.uint8]
    """[N], bits in which the two perceptual hashes differ; 0 for exact copies and kept rows."""
    num_plain: int
    """Rows that were not compared by their perceptual hashes, which are those of plain pictures."""


def gather(tables: Iterable[pyarrow.Table], most: int) -> Rows:
    """Read the hashes of the rows that have one picture and that the stage `filter` kept.

    Args:
        tables: of the stage `filter`, in the order of the shards, with `COLUMNS`.
        most: at least the number of rows of all tables; memory is used for the rows that are compared.
    """
    row = np.empty(most, np.uint32)
    digest = np.empty((most, 4), np.uint64)
    phash = np.empty(most, np.uint64)
    ends = []
    count = 0
    for table in tables:
        kept = table.filter(compute.and_(compute.is_null(table["reason"]), compute.is_valid(table["sha256"])))
        end = count + len(kept)
        row[count:end] = kept["row"]
        phash[count:end] = compute.fill_null(kept["phash"], 0)
        for chunk in kept["sha256"].chunks:
            words = np.frombuffer(chunk.buffers()[1], "<u8", 4 * len(chunk), 32 * chunk.offset)
            digest[count : count + len(chunk)] = words.reshape(-1, 4)
            count += len(chunk)
        ends.append(end)
    return Rows(row[:count], digest[:count], phash[:count], np.array(ends, np.int64))


def find_copies(rows: Rows, distance: int | None) -> Copies:
    """Find exact copies, and near copies among the other rows.

    Args:
        rows: that are compared.
        distance: most bits in which the perceptual hashes of near copies differ; None to find exact copies only.
    """
    of = drop_equal(rows.digest)
    exact = of >= 0
    bits = np.zeros(len(of), np.uint8)
    if distance is None:
        return Copies(of, exact, bits, 0)
    plain = ~exact & (np.bitwise_count(rows.phash) <= PLAIN_BITS)
    left = np.flatnonzero(~(exact | plain))
    near = drop_near(rows.phash[left], distance)
    dropped = near >= 0
    ours, theirs = left[dropped], left[near[dropped]]
    of[ours] = theirs
    bits[ours] = np.bitwise_count(rows.phash[ours] ^ rows.phash[theirs])
    return Copies(of, exact, bits, int(plain.sum()))


def drop_equal(digests: Digests) -> Numbers:
    """Decide for each digest whether it is the first of its value.

    Args:
        digests: [N, 4].

    Returns:
        [N]: for a later one, the number of the first equal one; -1 for the first.
    """
    of = np.full(len(digests), -1, np.int64)
    # Sorting by a quarter of each digest leaves few that may have an equal one.
    order = np.argsort(digests[:, 0])
    words = digests[order, 0]
    equal = words[1:] == words[:-1]
    several = np.zeros(len(digests), bool)
    several[1:] |= equal
    several[:-1] |= equal
    some = np.sort(order[several])
    some = some[np.lexsort(digests[some].T)]  # stable: equal ones stay in their order
    new = np.ones(len(some), bool)
    new[1:] = (digests[some[1:]] != digests[some[:-1]]).any(axis=1)
    first = some[new][np.cumsum(new) - 1] if len(some) else some
    of[some] = np.where(first == some, -1, first)
    return of


def dropped_tables(rows: Rows, copies: Copies) -> Iterator[pyarrow.Table]:
    """The table of dropped rows of each shard, in `SCHEMA`."""
    start = 0
    for end in rows.ends.tolist():
        dropped = start + np.flatnonzero(copies.of[start:end] >= 0)
        of = copies.of[dropped]
        columns = {
            "row": rows.row[dropped].astype(np.int64),
            "reason": np.where(copies.exact[dropped], EXACT, NEAR),
            "of_shard": rows.shard_of(of).astype(np.int32),
            "of_row": rows.row[of].astype(np.int64),
            "distance": copies.distance[dropped].astype(np.int32),
        }
        yield pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()}).cast(SCHEMA)
        start = end
