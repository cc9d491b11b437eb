"""The stage `select`: the pictures nearest to each centre, over all shards, and a page to look at them.

WORK/select/index.html shows sizes of clusters, distances, and contact sheets of 20 clusters. Later stages read the
selected rows alone.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_eve.curation.clusters import NearestRows
from megatron_eve.curation.contact_sheets import choose_clusters, draw_sheet, read_thumbnails
from megatron_eve.curation.feature_files import (
    ASSIGN,
    CENTRES,
    SELECT,
    read_assigned,
    read_centres,
    write_chosen,
)
from megatron_eve.curation.selection_page import DISTANCES, selection_page
from megatron_eve.curation.stage import Stage
from megatron_eve.curation.work import Work
from megatron_eve.data.inspecting.statistics import Histogram
from megatron_eve.runtime.command_line import whole_number

_PAGE = "index.html"


@dataclass(frozen=True)
class SelectStage(Stage):
    """The nearest pictures of each cluster.

    Attributes:
        per_cluster: pictures of a cluster, or all where it has fewer.
    """

    name: ClassVar[str] = SELECT
    per_shard: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = (_PAGE,)
    needs: ClassVar[tuple[str, ...]] = (CENTRES, ASSIGN)

    per_cluster: int

    def run(self, work: Work, shard: int) -> Counter[str]:
        """See `Stage`."""
        centres = len(read_centres(work))
        nearest = NearestRows(centres, self.per_cluster)
        sizes, distances = np.zeros(centres, dtype=np.int64), Histogram(DISTANCES)
        for number in range(len(work.inputs)):
            found = read_assigned(work, number, centres)
            sizes += np.bincount(found["centre"], minlength=centres)
            distances.add(found["distance"])
            nearest.add(found)
        chosen = nearest.result()
        self._write_page(work, sizes, distances, chosen)
        by_row = chosen[np.lexsort((chosen["row"], chosen["shard"]))]
        bounds = np.searchsorted(by_row["shard"], np.arange(len(work.inputs) + 1))
        for number, (start, stop) in enumerate(pairwise(bounds.tolist())):
            write_chosen(work, SELECT, number, by_row[start:stop])
        return Counter(selected=len(chosen))

    def _write_page(
        self, work: Work, sizes: NDArray[np.int64], distances: Histogram, chosen: NDArray[np.void]
    ) -> None:
        selected = Histogram(DISTANCES)
        selected.add(chosen["distance"])
        sheets = choose_clusters(sizes, chosen)
        pictures = read_thumbnails(work, sheets)
        drawn = [(sheet.title, draw_sheet(sheet, pictures)) for sheet in sheets]
        facts = self._facts(sizes, len(chosen))
        with work.output_file(SELECT, _PAGE) as path:
            text = selection_page(work.folder.name, facts, sizes, (distances, selected), drawn)
            path.write_text(text, encoding="utf-8")

    def _facts(self, sizes: NDArray[np.int64], chosen: int) -> list[tuple[str, str]]:
        """Rows of the summary."""
        total, empty = int(sizes.sum()), int((sizes == 0).sum())
        short = int(((sizes > 0) & (sizes < self.per_cluster)).sum())
        return [
            ("selected", f"{chosen:,} of {total:,} pictures ({chosen / max(total, 1):.1%})"),
            (
                "clusters",
                f"{len(sizes):,}; {short:,} have fewer than {self.per_cluster:,} pictures, all of which are taken; "
                f"{empty:,} are empty; the largest has {int(sizes.max()):,}",
            ),
        ]

    def report(self, work: Work) -> list[tuple[str, str]]:
        """See `Stage`."""
        centres = len(read_centres(work))
        sizes, chosen = np.zeros(centres, dtype=np.int64), 0
        for shard in range(len(work.inputs)):
            sizes += np.bincount(read_assigned(work, shard, centres)["centre"], minlength=centres)
            chosen += len(work.read_table(SELECT, shard, ("row",)))
        return [*self._facts(sizes, chosen), ("page", str(work.stage_folder(SELECT) / _PAGE))]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this stage."""
    parser.add_argument(
        "--per-cluster",
        type=whole_number(1),
        default=300,
        metavar="N",
        help="pictures that are taken of each cluster, those nearest to its centre (published for EVE: 300)",
    )


def from_flags(flags: argparse.Namespace) -> SelectStage:
    """The stage with the settings of the command line."""
    return SelectStage(flags.per_cluster)
