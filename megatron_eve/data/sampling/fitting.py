"""Finds samples that are too large for any pack of a run, from the records of a dataset, before the first step.

One such sample among millions must neither stop a run nor keep it from starting, so the run leaves it out of its
sample order and prints a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_NAMED = 5  # samples named in a message


@dataclass(frozen=True)
class PackLimits:
    """Limits for one sample.

    Attributes:
        seq_length: tokens of a pack.
        positions: positions of the model within a sample (--max-position-embeddings).
        max_images: images of a pack; None for no limit.
    """

    seq_length: int
    positions: int
    max_images: int | None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that fits."""
        return min(self.seq_length, self.positions)

    def oversized(self, samples: Any, longest: int) -> NDArray[np.int64]:
        """Rows of a dataset that exceed a limit.

        Args:
            samples: SAMPLE_DTYPE [n] of the dataset, indexed like an array; read only if a sample may be too large.
            longest: tokens of its longest sample, from its manifest.

        Returns:
            int64 [m] rows, ascending.
        """
        too_large = np.zeros(len(samples), dtype=bool)
        if longest > self.longest:
            too_large |= samples["length"] > self.longest
        if self.max_images is not None:
            too_large |= samples["num_images"] > self.max_images
        return np.flatnonzero(too_large).astype(np.int64)

    def describe(self, samples: Any, rows: NDArray[np.int64], sample_name: Callable[[int], str]) -> str:
        """Message about the samples that do not fit: how many, why, which ones, and the remedy.

        Args:
            samples: SAMPLE_DTYPE [n] of the dataset.
            rows: int64 [m], those that do not fit; at least one.
            sample_name: returns the name of a row in a message.
        """
        records = samples[rows]
        examples = ", ".join(
            f"{sample_name(int(row))} ({record['length']} tokens, {record['num_images']} images)"
            for row, record in zip(rows[:_FIRST_NAMED], records, strict=False)
        )
        more = f" and {len(rows) - _FIRST_NAMED:,} more" if len(rows) > _FIRST_NAMED else ""
        return (
            f"{len(rows):,} of {len(samples):,} samples cannot be packed and are left out: {examples}{more}; "
            f"{'; '.join(self._reasons(records))}"
        )

    def _reasons(self, records: NDArray[Any]) -> Iterator[str]:
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
            many = records[records["num_images"] > self.max_images]
            if len(many):
                yield (
                    f"{len(many):,} with more images than --max-images-per-pack {self.max_images} (raise it to "
                    f"{many['num_images'].max()} or more)"
                )
