"""Finds samples that are too large for any pack of a run, from the records of a dataset, before the first step.

One such sample among millions must neither stop a run nor keep it from starting, so the run leaves it out of its
sample order and prints a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.dataset import VisionDataset

_FIRST_NAMED = 5  # samples named in a message
_COUNTED_AT_ONCE = 1 << 20  # samples whose images are counted at a time


@dataclass(frozen=True)
class PackLimits:
    """Limits for one sample.

    Attributes:
        seq_length: tokens of a pack.
        positions: positions of the model within a sample (--max-position-embeddings).
        max_images: images of a pack, tile by tile; None for no limit.
    """

    seq_length: int
    positions: int
    max_images: int | None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that fits."""
        return min(self.seq_length, self.positions)

    def oversized(self, dataset: VisionDataset) -> NDArray[np.int64]:
        """Rows of a dataset that exceed a limit: int64 [m], ascending. Records are read if one may be too large."""
        samples = dataset.samples
        too_large = np.zeros(len(samples), dtype=bool)
        if dataset.info.longest_length > self.longest:
            too_large |= samples["length"] > self.longest
        if self.max_images is not None:
            for start in range(0, len(samples), _COUNTED_AT_ONCE):
                some = np.arange(start, min(start + _COUNTED_AT_ONCE, len(samples)), dtype=np.int64)
                too_large[some] |= dataset.tile_counts(some) > self.max_images
        return np.flatnonzero(too_large).astype(np.int64)

    def describe(self, dataset: VisionDataset, rows: NDArray[np.int64]) -> str:
        """Message about the samples that do not fit: how many, why, which ones, and the remedy.

        Args:
            dataset: of the samples.
            rows: int64 [m], those that do not fit; at least one.
        """
        records, images = dataset.samples[rows], dataset.tile_counts(rows)
        examples = ", ".join(
            f"{dataset.sample_name(int(row))} ({record['length']} tokens, {_images(record, count)})"
            for row, record, count in zip(rows[:_FIRST_NAMED], records, images, strict=False)
        )
        more = f" and {len(rows) - _FIRST_NAMED:,} more" if len(rows) > _FIRST_NAMED else ""
        return (
            f"{len(rows):,} of {len(dataset.samples):,} samples cannot be packed and are left out: {examples}{more}; "
            f"{'; '.join(self._reasons(records, images))}"
        )

    def _reasons(self, records: NDArray[Any], images: NDArray[np.int64]) -> Iterator[str]:
        """For each limit that is exceeded, the number of records and the remedy."""
        long = records[records["length"] > self.seq_length]
        if len(long):
            # Images are not shortened by a smaller --model-max-length, which counts each as one token.
            cut = (
                ""
                if long["num_images"].any()
                else f", or preprocess with --model-max-length {self.seq_length}"
            )
            yield (
                f"{len(long):,} longer than --seq-length {self.seq_length} (raise it to {long['length'].max()} or more"
                f"{cut})"
            )
        over_limit = records[records["length"] > self.positions]
        if len(over_limit):
            yield (
                f"{len(over_limit):,} longer than the model's --max-position-embeddings {self.positions} "
                f"(use a model with {over_limit['length'].max()} or more)"
            )
        if self.max_images is not None:
            many = images > self.max_images
            if many.any():
                tiles = ", tile by tile," if (images != records["num_images"]).any() else ""
                yield (
                    f"{many.sum():,} with more images{tiles} than --max-images-per-pack {self.max_images} (raise it to "
                    f"{images.max()} or more)"
                )


def _images(record: Any, count: int) -> str:
    """How many images a sample has, and how many tiles they are cut into."""
    tiles = f" in {count} tiles" if count != record["num_images"] else ""
    return f"{record['num_images']} images{tiles}"
