"""Samples that no pack of a run can hold: found from the records of a dataset alone, before the first step.

One such sample among millions must neither end a run in the middle nor keep it from starting, so the run leaves it
out of its order and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_NAMED = 5  # samples that a message names


@dataclass(frozen=True)
class PackLimits:
    """What one sample may have.

    Attributes:
        seq_length: tokens of a pack.
        positions: that the model tells apart within a sample (--max-position-embeddings).
        most_images: of a pack; None does not bound it.
    """

    seq_length: int
    positions: int
    most_images: int | None

    @property
    def longest(self) -> int:
        """Tokens of the longest sample that fits."""
        return min(self.seq_length, self.positions)

    def oversized(self, samples: Any, longest: int) -> NDArray[np.int64]:
        """The rows of a dataset that do not fit.

        Args:
            samples: SAMPLE_DTYPE [n] of the dataset, indexed like an array; read only if something may be too large.
            longest: tokens of its longest sample, by its manifest.

        Returns:
            int64 [m] rows, ascending.
        """
        too_large = np.zeros(len(samples), dtype=bool)
        if longest > self.longest:
            too_large |= samples["length"] > self.longest
        if self.most_images is not None:
            too_large |= samples["num_images"] > self.most_images
        return np.flatnonzero(too_large).astype(np.int64)

    def describe(self, samples: Any, rows: NDArray[np.int64], sample_name: Callable[[int], str]) -> str:
        """Say how many of a dataset's samples do not fit, why, which, and what helps.

        Args:
            samples: SAMPLE_DTYPE [n] of the dataset.
            rows: int64 [m], those that do not fit; at least one.
            sample_name: gives what a message calls a row.
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
        """For each limit that a record is beyond, how many are, and the remedy."""
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
        if self.most_images is not None:
            many = records[records["num_images"] > self.most_images]
            if len(many):
                yield (
                    f"{len(many):,} with more images than --max-images-per-pack {self.most_images} (raise it to "
                    f"{many['num_images'].max()} or more)"
                )
