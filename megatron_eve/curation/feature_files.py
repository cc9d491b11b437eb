"""The files of the stages of clustering: features, centres, and the nearest centre of each row.

Shapes: n = rows of a shard that have a feature, D = width of a feature, K = centres.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray

from megatron_eve.curation.clusters import CHOSEN, Vectors
from megatron_eve.curation.work import Work

FEATURES, CENTRES, ASSIGN, SELECT = "features", "centres", "assign", "select"
VECTORS_SUFFIX, ROWS_SUFFIX = ".npy", "_rows.npy"
CENTRES_FILE = "centres.npy"


class Features(NamedTuple):
    """Features of a shard.

    Attributes:
        vectors: float16 [n, D] of length 1, mapped from the file.
        rows: int64 [n], ascending: numbers of the rows in the shard.
    """

    vectors: NDArray[np.float16]
    rows: NDArray[np.int64]


def write_features(work: Work, shard: int, vectors: NDArray[np.float16], rows: NDArray[np.int64]) -> None:
    """Write the features of a shard."""
    for suffix, array in ((VECTORS_SUFFIX, vectors), (ROWS_SUFFIX, rows)):
        with work.output(FEATURES, shard, suffix) as path:
            np.save(path, array)


def read_features(work: Work, shard: int, width: int | None = None) -> Features:
    """The features of a shard.

    Args:
        work: the curation.
        shard: number of the shard.
        width: D that they must have.

    Raises:
        DataError: a file is missing, damaged, of another shard or of another tower.
    """
    names = [f"{shard:05d}{suffix}" for suffix in (VECTORS_SUFFIX, ROWS_SUFFIX)]
    vectors, rows = (work.read_array(FEATURES, name) for name in names)
    if vectors.ndim != 2 or vectors.dtype != np.float16:
        raise work.damaged(FEATURES, names[0], f"{vectors.dtype} {list(vectors.shape)}, not float16 [n, D]")
    if width is not None and vectors.shape[1] != width:
        raise work.damaged(
            FEATURES, names[0], f"features of another tower: {vectors.shape[1]} wide, the others {width}"
        )
    if rows.shape != vectors.shape[:1] or not _ascending(rows, work.inputs.rows[shard]):
        raise work.damaged(
            FEATURES,
            names[1],
            f"its rows are not those of {len(vectors)} features of a shard with {work.inputs.rows[shard]} rows",
        )
    return Features(vectors, np.array(rows, dtype=np.int64))  # type: ignore[arg-type]


def feature_counts(work: Work) -> tuple[NDArray[np.int64], int]:
    """The number of features of each shard, int64 [shards], and their width D.

    Raises:
        DataError: as `read_features`.
    """
    counts, width = np.zeros(len(work.inputs), dtype=np.int64), None
    for shard in range(len(work.inputs)):
        vectors = read_features(work, shard, width).vectors
        counts[shard], width = vectors.shape
    return counts, width or 0


def read_centres(work: Work) -> Vectors:
    """The centres, float32 [K, D].

    Raises:
        DataError: the file is missing or damaged.
    """
    centres = work.read_array(CENTRES, CENTRES_FILE)
    if centres.ndim != 2 or centres.dtype != np.float32 or not np.isfinite(centres).all():
        raise work.damaged(
            CENTRES, CENTRES_FILE, f"{centres.dtype} {list(centres.shape)}, not finite float32 [K, D]"
        )
    return np.array(centres, dtype=np.float32)


def read_assigned(work: Work, shard: int, centres: int) -> NDArray[np.void]:
    """The rows of a shard with their nearest centres, an array of `clusters.CHOSEN`.

    Args:
        work: the curation.
        shard: number of the shard.
        centres: K.

    Raises:
        DataError: the table is missing, damaged, or of other rows or centres.
    """
    table = work.read_table(ASSIGN, shard, ("row", "centre", "distance"))
    found = np.empty(len(table), CHOSEN)
    for column in ("row", "centre", "distance"):
        found[column] = table[column].to_numpy()
    found["shard"] = shard
    name = work.table(ASSIGN, shard).name
    if not _ascending(found["row"], work.inputs.rows[shard]):
        raise work.damaged(
            ASSIGN, name, f"its rows are not those of a shard with {work.inputs.rows[shard]} rows"
        )
    if len(found) and not (found["centre"].min() >= 0 and found["centre"].max() < centres):
        raise work.damaged(ASSIGN, name, f"a centre beyond the {centres} of the stage {CENTRES}")
    return found


def write_chosen(work: Work, stage: str, shard: int, chosen: NDArray[np.void]) -> None:
    """Write rows of a shard with their nearest centres: columns row, centre and distance (1 - cosine)."""
    columns: dict[str, Any] = {name: chosen[name] for name in ("row", "centre", "distance")}
    work.write_table(stage, shard, pyarrow.table(columns))


def _ascending(rows: NDArray[Any], count: int) -> bool:
    """Whether these are numbers below `count`, each larger than the one before."""
    if rows.ndim != 1 or rows.dtype.kind != "i":
        return False
    return not len(rows) or bool(rows[0] >= 0 and rows[-1] < count and (np.diff(rows) > 0).all())
