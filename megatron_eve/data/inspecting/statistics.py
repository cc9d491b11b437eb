"""Statistics of a dataset, counted from its records chunk by chunk; pictures and texts are not read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.format.metadata import META
from megatron_eve.data.inspecting.checking import parts_of

_CHUNK = 1 << 20  # records
_BARS = 40  # at most
MOST_IMAGES = 16
"""Samples with more are counted together."""

# Bounds for picture sides: half powers of two, 8 to 32,768 pixels; other sizes count in the first or last box.
SIDES = 2.0 ** np.arange(3, 15.5, 0.5)
ASPECTS = 2.0 ** np.arange(-3, 3.25, 0.25)
"""Width over height, 1:8 to 8:1, in quarter powers of two."""

FILE_SIZES = np.array([step * 10**power for power in range(2, 9) for step in (1, 2, 5)], dtype=np.float64)
"""Bytes, 100 to 500 million."""

_LICENCE_COLUMNS = ("licence", "license")


@dataclass
class Histogram:
    """A histogram: the number of values between each two edges; values outside count in the first or last box.

    Attributes:
        edges: [n + 1], rising.
        counts: int64 [n].
        total: sum of all values.
        low, high: smallest and largest value.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64] = field(init=False)
    total: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.edges) - 1, dtype=np.int64)

    @property
    def mean(self) -> float:
        """The mean value; 0 if there is none."""
        return self.total / max(int(self.counts.sum()), 1)

    def add(self, values: NDArray[np.generic]) -> None:
        """Add any number of values."""
        if not len(values):
            return
        numbers = values.astype(np.float64)
        self.total += float(numbers.sum())
        self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
        clipped = np.clip(numbers, self.edges[0], self.edges[-1])
        self.counts += np.histogram(clipped, self.edges)[0]


@dataclass
class Statistics:
    """Statistics of the records of a dataset.

    Attributes:
        lengths: of samples in tokens, once images are expanded.
        text_lengths: the same with an image counted as one.
        label_shares: of samples, number of labels that train divided by expanded tokens.
        images: of samples, number of images.
        widths, heights: of pictures, in pixels.
        aspects: of pictures, width over height.
        sizes: int64 [24, 24], pictures by width and height (`SIDES`).
        picture_bytes: of the files.
        licences: rows by licence, from OUT_meta.parquet; None if there is no such table or column.
    """

    lengths: Histogram
    text_lengths: Histogram
    label_shares: Histogram
    images: Histogram
    widths: Histogram
    heights: Histogram
    aspects: Histogram
    sizes: NDArray[np.int64]
    picture_bytes: Histogram
    licences: Counter[str] | None = None


def read_statistics(dataset: AnyDataset) -> Statistics:
    """Count what the records of a dataset say."""
    parts = parts_of(dataset)
    longest_text, most_images = (
        max(0, *(int(part.samples[name].max()) for part in parts)) for name in ("text_length", "num_images")
    )
    statistics = Statistics(
        lengths=Histogram(_whole_edges(max(dataset.info.longest_length, 0))),
        text_lengths=Histogram(_whole_edges(longest_text)),
        label_shares=Histogram(np.arange(21, dtype=np.float64) / 20),
        images=Histogram(np.arange(min(most_images, MOST_IMAGES) + 2, dtype=np.float64)),
        widths=Histogram(SIDES),
        heights=Histogram(SIDES),
        aspects=Histogram(ASPECTS),
        sizes=np.zeros((len(SIDES) - 1, len(SIDES) - 1), dtype=np.int64),
        picture_bytes=Histogram(FILE_SIZES),
    )
    for part in parts:
        for start in range(0, len(part.samples), _CHUNK):
            records = part.samples[start : start + _CHUNK]
            statistics.lengths.add(records["length"])
            statistics.text_lengths.add(records["text_length"])
            statistics.label_shares.add(records["labels"] / np.maximum(records["length"], 1))
            statistics.images.add(records["num_images"])
        for start in range(0, len(part.images), _CHUNK):
            _add_pictures(statistics, part.images[start : start + _CHUNK])
        found = read_licences(Path(part.prefix + META))
        if found is not None:
            statistics.licences = (statistics.licences or Counter()) + found
    return statistics


def _add_pictures(statistics: Statistics, records: NDArray[np.void]) -> None:
    width, height = records["width"].astype(np.float64), records["height"].astype(np.float64)
    statistics.widths.add(width)
    statistics.heights.add(height)
    statistics.aspects.add(width / np.maximum(height, 1))
    statistics.picture_bytes.add(records["num_bytes"])
    low, high = SIDES[0], SIDES[-1]
    clipped = np.clip(width, low, high), np.clip(height, low, high)
    statistics.sizes += np.histogram2d(*clipped, bins=(SIDES, SIDES))[0].astype(np.int64)


def read_licences(path: Path) -> Counter[str] | None:
    """Number of rows by licence, from the column `licence` or `license` of a table; None if there is none."""
    if not path.is_file():
        return None
    with pq.ParquetFile(path) as table:
        column = next((name for name in _LICENCE_COLUMNS if name in table.schema_arrow.names), None)
        if column is None:
            return None
        counts: Counter[str] = Counter()
        for batch in table.iter_batches(columns=[column]):
            for pair in batch.column(0).value_counts().to_pylist():
                counts[str(pair["values"] or "not said")] += pair["counts"]
        return counts


def _whole_edges(longest: int) -> NDArray[np.float64]:
    """Edges of bars of equal, round width, from 0 to above the largest value."""
    widths = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next((width for width in widths if width * _BARS > longest), longest)
    return np.arange(longest // width + 2, dtype=np.float64) * width
