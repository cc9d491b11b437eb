"""The stage `centres`: centres of clusters, by spherical K-means (faiss) on a sample of the features."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from megatron_eve.curation.clusters import Vectors, sample_numbers, train_centres, unit_length
from megatron_eve.curation.feature_files import CENTRES, CENTRES_FILE, FEATURES, feature_counts, read_features
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.runtime.command_line import whole_number

_TRAINING = "training.json"


@dataclass(frozen=True)
class CentresStage(Stage):
    """Centres of the features of all shards.

    Attributes:
        centres: their number.
        points_per_centre: features they are trained on, for each.
        rounds: of K-means.
        seed: chooses the sample, and in it the first centres.
    """

    name: ClassVar[str] = CENTRES
    per_shard: ClassVar[bool] = False
    suffixes: ClassVar[tuple[str, ...]] = ()
    files: ClassVar[tuple[str, ...]] = (CENTRES_FILE, _TRAINING)
    needs: ClassVar[tuple[str, ...]] = (FEATURES,)

    centres: int
    points_per_centre: int
    rounds: int
    seed: int

    def check(self, work: Work) -> None:
        """See `Stage`: there must be more features than centres."""
        total = int(feature_counts(work)[0].sum())
        if total < self.centres:
            raise DataError(
                f"--centres {self.centres}: {work.stage_folder(FEATURES)} has features of {total} pictures; give that "
                "number or a smaller one"
            )

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`."""
        points = self._sample(work)
        centres, cosines = train_centres(points, self.centres, self.rounds, self.seed)
        with work.output_file(CENTRES, CENTRES_FILE) as path:
            np.save(path, centres)
        with work.output_file(CENTRES, _TRAINING) as path:
            path.write_text(
                json.dumps({"points": len(points), "mean_cosines": cosines}) + "\n", encoding="utf-8"
            )
        return Counter(points=len(points))

    def _sample(self, work: Work) -> Vectors:
        """The features that the centres are trained on: float32 [points, D], in the order of shards and rows."""
        counts, width = feature_counts(work)
        numbers = sample_numbers(int(counts.sum()), self.centres * self.points_per_centre, self.seed)
        points = np.empty((len(numbers), width), dtype=np.float32)
        ends = np.cumsum(counts)
        bounds = np.searchsorted(numbers, [0, *ends.tolist()])
        for shard, (start, stop) in enumerate(pairwise(bounds.tolist())):
            if start < stop:
                rows = numbers[start:stop] - (ends[shard] - counts[shard])
                points[start:stop] = unit_length(read_features(work, shard, width).vectors[rows])
        return points

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        found = json.loads((work.stage_folder(CENTRES) / _TRAINING).read_text(encoding="utf-8"))
        points, cosines = found["points"], found["mean_cosines"]
        return [
            (
                "centres",
                f"{self.centres:,}, trained on {points:,} pictures ({points / self.centres:.1f} for each)",
            ),
            (
                "mean cosine",
                f"{cosines[0]:.4f} after the first round, {cosines[-1]:.4f} after round {len(cosines)}",
            ),
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    parser.add_argument(
        "--centres",
        type=whole_number(1),
        required=True,
        metavar="K",
        help="number of clusters (published for EVE: 50,000)",
    )
    parser.add_argument(
        "--points-per-centre",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="train on N x K pictures, chosen at random over all shards",
    )
    parser.add_argument("--rounds", type=whole_number(1), default=20, metavar="N", help="rounds of K-means")
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed that chooses the pictures to train on",
    )


def from_flags(flags: argparse.Namespace) -> CentresStage:
    """The stage with the settings of the command line."""
    return CentresStage(flags.centres, flags.points_per_centre, flags.rounds, flags.seed)
