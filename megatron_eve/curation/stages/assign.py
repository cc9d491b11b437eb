"""The stage `assign`: the nearest centre of each picture, and the distance to it (1 - cosine)."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from megatron_eve.curation.clusters import CHOSEN, NearestCentre
from megatron_eve.curation.feature_files import (
    ASSIGN,
    CENTRES,
    FEATURES,
    read_assigned,
    read_centres,
    read_features,
    write_chosen,
)
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.work import Work


@dataclass(frozen=True)
class AssignStage(Stage):
    """Nearest centres of the features of a shard."""

    name: ClassVar[str] = ASSIGN
    needs: ClassVar[tuple[str, ...]] = (FEATURES, CENTRES)

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`."""
        centres = read_centres(work)
        features = read_features(work, shard, centres.shape[1])
        found = np.empty(len(features.rows), CHOSEN)
        found["shard"], found["row"] = shard, features.rows
        found["centre"], found["distance"] = NearestCentre(centres)(features.vectors)
        write_chosen(work, ASSIGN, shard, found)
        return Counter(assigned=len(found))

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        centres = len(read_centres(work))
        total, distance = 0, 0.0
        for shard in range(len(work.inputs)):
            found = read_assigned(work, shard, centres)
            total, distance = total + len(found), distance + float(found["distance"].sum(dtype=np.float64))
        return [
            (
                "assigned",
                f"{total:,} pictures to {centres:,} centres, mean distance {distance / max(total, 1):.4f}",
            )
        ]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """This stage has no flags."""


def from_flags(flags: argparse.Namespace) -> AssignStage:
    """The stage with the settings of the command line."""
    return AssignStage()
