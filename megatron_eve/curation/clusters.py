"""Spherical K-means by faiss, and the nearest rows of each centre. All vectors have length 1.

Shapes: n = vectors, D = width of a vector, K = centres.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.sampling.permutation import sample_order

Vectors = NDArray[np.float32]

CHOSEN = np.dtype([("centre", "<i4"), ("distance", "<f4"), ("shard", "<i4"), ("row", "<i8")])
"""A row of the input with its nearest centre; distance is 1 - cosine."""

_BLOCK = 4096  # vectors that are compared with all centres at a time
# Products of matrices depend on where in a block a vector stands, by about 1e-7. So the nearest few centres are
# compared again, in float64 and vector by vector: the result does not depend on how the vectors are cut into shards.
_CANDIDATES = 4


def unit_length(vectors: NDArray[np.floating]) -> Vectors:
    """float32 [n, D], each vector divided by its length; a vector of zeros stays."""
    wide = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.maximum(lengths, np.finfo(np.float32).tiny)


def sample_numbers(total: int, size: int, seed: int) -> NDArray[np.int64]:
    """`size` different numbers below `total`, ascending: chosen by a keyed permutation, whatever the shards."""
    return np.sort(sample_order(np.arange(min(size, total), dtype=np.int64), total, seed))


def train_centres(points: Vectors, centres: int, rounds: int, seed: int) -> tuple[Vectors, list[float]]:
    """Centres of spherical K-means, on the GPUs if this faiss was built for them.

    Args:
        points: float32 [n, D] of length 1, at least as many as centres.
        centres: K.
        rounds: of assignment and update.
        seed: chooses the first centres.

    Returns:
        float32 [K, D] of length 1, and after each round the mean cosine between a point and its centre.
    """
    import faiss

    means: Any = faiss.Kmeans(
        points.shape[1],
        centres,
        niter=rounds,
        spherical=True,
        seed=seed,
        gpu=bool(faiss.get_num_gpus()),
        # All points are used, and faiss does not warn of few: the report says how many each centre had.
        max_points_per_centroid=len(points),
        min_points_per_centroid=1,
    )
    means.train(points)
    return unit_length(means.centroids), [float(total) / len(points) for total in means.obj]


class NearestCentre:
    """Finds the nearest centre of vectors, by comparing all.

    Args:
        centres: float32 [K, D] of length 1.
    """

    def __init__(self, centres: Vectors) -> None:
        import faiss

        self._centres = centres
        self._index: Any = faiss.IndexFlatIP(centres.shape[1])
        if faiss.get_num_gpus():
            self._index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, self._index)
        self._index.add(centres)

    def __call__(self, vectors: NDArray[np.floating]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The nearest centre of each vector, the first of equal ones.

        Args:
            vectors: [n, D], of any length but 0; they may be mapped from a file, and are read block by block.

        Returns:
            int32 [n] numbers of centres, and float32 [n] distances, 1 - cosine.
        """
        found = np.empty(len(vectors), dtype=np.int32)
        distances = np.empty(len(vectors), dtype=np.float32)
        for start in range(0, len(vectors), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(vectors)))
            found[block], distances[block] = self._nearest(unit_length(vectors[block]))
        return found, distances

    def _nearest(self, vectors: Vectors) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        _, candidates = self._index.search(vectors, min(_CANDIDATES, len(self._centres)))
        candidates.sort(axis=1)  # so that the first of equal ones wins
        wide = vectors.astype(np.float64)
        products = (wide * self._centres[column].astype(np.float64) for column in candidates.T)
        cosines = np.stack([product.sum(axis=1) for product in products], axis=1)
        best = cosines.argmax(axis=1)
        rows = np.arange(len(vectors))
        return candidates[rows, best], np.maximum(1 - cosines[rows, best], 0)


@dataclass
class NearestRows:
    """The nearest rows of each centre, of tables that are added one after the other.

    Between centre and row, equal distances go by shard and row. Memory: at most about twice `centres` x `per_centre`
    entries of 20 bytes, and as much again while they are sorted.

    Attributes:
        centres: K.
        per_centre: rows that are kept for each.
    """

    centres: int
    per_centre: int
    _kept: NDArray[np.void] = field(default_factory=lambda: np.empty(0, CHOSEN))
    _waiting: list[NDArray[np.void]] = field(default_factory=list)
    _farthest: NDArray[np.float32] = field(init=False)  # distance of the last row of a centre that is full

    def __post_init__(self) -> None:
        self._farthest = np.full(self.centres, np.inf, dtype=np.float32)

    def add(self, table: NDArray[np.void]) -> None:
        """Add rows, an array of CHOSEN."""
        near = table[table["distance"] <= self._farthest[table["centre"]]]
        self._waiting.append(near)
        if sum(map(len, self._waiting)) > max(self.centres * self.per_centre, _BLOCK):
            self._prune()

    def result(self) -> NDArray[np.void]:
        """The kept rows, sorted by centre, then distance, shard and row."""
        self._prune()
        return self._kept

    def _prune(self) -> None:
        rows = np.concatenate([self._kept, *self._waiting])
        self._waiting = []
        rows = rows[np.lexsort((rows["row"], rows["shard"], rows["distance"], rows["centre"]))]
        starts = np.searchsorted(rows["centre"], np.arange(self.centres))
        rank = np.arange(len(rows)) - starts[rows["centre"]]
        self._kept = rows[rank < self.per_centre]
        last = self._kept[rank[rank < self.per_centre] == self.per_centre - 1]
        self._farthest[last["centre"]] = last["distance"]


def evenly_spaced(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` of the values at even steps, the first and the last among them; all where there are no more."""
    steps = np.linspace(0, len(values) - 1, min(count, len(values)))
    return values[np.rint(steps).astype(np.int64)]
