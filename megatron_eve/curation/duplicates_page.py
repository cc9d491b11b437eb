"""The page of duplicates: dropped pictures beside those of which they are copies."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from pathlib import Path

import numpy as np

from megatron_eve.curation.dropped_page import SIDE
from megatron_eve.curation.duplicates import EXACT
from megatron_eve.curation.thumbnails import Place, picture_html, records_at, thumbnail
from megatron_eve.curation.work import Work
from megatron_eve.data.inspecting.html import html_page

PAGE = "duplicates.html"
SHOWN = 12
"""Pairs of each kind: exact copies, and near copies of each distance."""
_STYLE = """
.pairs { display: grid; grid-template-columns: repeat(auto-fill, 480px); gap: 16px 20px; margin: 8px 0 28px; }
.pairs section { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; font-size: 13px; align-items: end; }
.pairs img { max-width: 100%; display: block; border: 1px solid #ccc; }
.pairs p { margin: 0; color: #555; }
"""

_MOST_SHARDS = 8  # that are read for the page


def write_duplicates_page(work: Work) -> Path:
    """Write WORK/duplicates/duplicates.html and return its path.

    Raises:
        DataError: a table or a shard cannot be read.
    """
    groups = _choose(work)
    places = {place for pairs in groups.values() for pair in pairs for place in pair}
    copies = {place: thumbnail(record, SIDE) for place, record in records_at(work, places)}
    pictures = {place: "" if isinstance(copy, str) else picture_html(copy) for place, copy in copies.items()}
    parts = [f"<style>{_STYLE}</style><h1>Duplicates</h1><p>{escape(str(work.folder))}</p>"]
    parts.append("<p>On the left the earlier picture, on the right its copy, which is dropped.</p>")
    for (reason, distance), pairs in sorted(groups.items()):
        title = "The same file" if reason == EXACT else f"Perceptual hashes differ in {distance} bits"
        parts.append(f"<h2>{title}</h2><div class=pairs>")
        for pair in pairs:
            sides = [
                f"<div>{pictures[shard, row]}<p>shard {shard}, row {row}</p></div>" for shard, row in pair
            ]
            parts.append(f"<section>{''.join(sides)}</section>")
        parts.append("</div>")
    with work.output_file("duplicates", PAGE) as path:
        path.write_text(html_page("Duplicates", "".join(parts)), encoding="utf-8")
    return work.stage_folder("duplicates") / PAGE


def _choose(work: Work) -> dict[tuple[str, int], list[tuple[Place, Place]]]:
    """Up to SHOWN pairs of each reason and distance: (earlier row, dropped row), from few shards."""
    groups: dict[tuple[str, int], list[tuple[Place, Place]]] = defaultdict(list)
    shards: set[int] = set()
    for shard in np.random.default_rng(0).permutation(len(work.inputs)).tolist():
        for found in work.read_table("duplicates", shard).to_pylist():
            group = groups[found["reason"], found["distance"]]
            more = shards | {shard, found["of_shard"]}
            if len(group) < SHOWN and len(more) <= _MOST_SHARDS:
                shards = more
                group.append(((found["of_shard"], found["of_row"]), (shard, found["row"])))
        if len(shards) >= _MOST_SHARDS:
            break
    return groups
