"""The page of rows that the filter dropped: some of each reason, with their pictures and captions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from megatron_eve.curation.captions_of_records import caption_of
from megatron_eve.curation.reasons import find_reason
from megatron_eve.curation.thumbnails import picture_html, records_at, thumbnail
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.inspecting.html import html_page
from megatron_eve.data.schema import Record

PAGE = "dropped.html"
SHOWN = 12
"""Rows of each reason."""
SIDE = 224
"""Pixels of the longer side of a picture on the page."""
_LONGEST_TEXT = 300  # characters of a caption on the page
_STYLE = """
.rows { display: grid; grid-template-columns: repeat(auto-fill, 230px); gap: 16px 20px; margin: 8px 0 28px; }
.rows section { font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.rows img { max-width: 100%; display: block; border: 1px solid #ccc; margin-bottom: 4px; }
.rows p { margin: 0 0 3px; unicode-bidi: plaintext; } .rows .note { color: #555; }
"""


@dataclass(frozen=True)
class _Dropped:
    """One dropped row: its shard and number, and what the filter said of it."""

    shard: int
    row: int
    reason: str
    detail: str


def write_dropped_page(work: Work, counts: Mapping[str, int], total: int) -> Path:
    """Write WORK/filter/dropped.html and return its path.

    Args:
        work: with a finished filter.
        counts: dropped rows by reason.
        total: rows that were read.

    Raises:
        DataError: a table or a shard cannot be read.
    """
    by_reason: dict[str, list[_Dropped]] = defaultdict(list)
    for one in _choose(work, counts):
        by_reason[one.reason].append(one)
    places = [(one.shard, one.row) for rows in by_reason.values() for one in rows]
    records = dict(records_at(work, places))
    parts = [f"<style>{_STYLE}</style><h1>Dropped rows</h1><p>{escape(str(work.folder))}</p>"]
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        meaning = find_reason(reason)
        parts.append(
            f"<h2>{escape(reason)}: {count:,} row{'s' * (count > 1)} ({count / total:.1%})</h2>"
            f"<p>{escape(meaning.what)}. To do: {escape(meaning.remedy)}.</p><div class=rows>"
        )
        parts += [_section(one, records[one.shard, one.row]) for one in by_reason[reason]]
        parts.append("</div>")
    with work.output_file("filter", PAGE) as path:
        path.write_text(html_page("Dropped rows", "".join(parts)), encoding="utf-8")
    return work.stage_folder("filter") / PAGE


def _choose(work: Work, counts: Mapping[str, int]) -> Iterator[_Dropped]:
    """Up to SHOWN rows of each reason, from shards in a random order that is always the same."""
    wanted = Counter({reason: min(count, SHOWN) for reason, count in counts.items()})
    for shard in np.random.default_rng(0).permutation(len(work.inputs)).tolist():
        if not +wanted:
            return
        table = work.read_table("filter", shard, ("row", "reason", "detail"))
        for row in table.filter(table["reason"].is_valid()).to_pylist():
            if wanted[row["reason"]] > 0:
                wanted[row["reason"]] -= 1
                yield _Dropped(shard, row["row"], row["reason"], row["detail"] or "")


def _section(one: _Dropped, record: Record | SkipRow) -> str:
    """One row as HTML."""
    lines = [f"<p class=note>shard {one.shard}, row {one.row}; {escape(one.detail)}</p>"]
    if isinstance(record, Record):
        try:
            text = caption_of(record) or ""
        except (KeyError, IndexError, TypeError, AttributeError):  # the turns are what is wrong with it
            text = ""
        cut = f"{text[:_LONGEST_TEXT]} ..." if len(text) > _LONGEST_TEXT else text
        lines.append(f"<p>{escape(cut).encode('utf-8', 'backslashreplace').decode()}</p>")
        picture = thumbnail(record, SIDE)
        if not isinstance(picture, str):
            lines.insert(0, picture_html(picture))
    return f"<section>{''.join(lines)}</section>"
