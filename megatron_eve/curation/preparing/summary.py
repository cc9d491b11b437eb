"""What `tools/prepare_data.py` prints at its end: counts, the rows that were left out and why, what to do next."""

from __future__ import annotations

from pathlib import Path

from megatron_eve.curation.preparing.output import SKIPPED, PreparedData
from megatron_eve.curation.preparing.reasons import PREPARING_REASONS
from megatron_eve.data.reasons import CHANGES

_ROWS_SHOWN = 2  # of each reason
_LICENSES_SHOWN = 5


def format_summary(data: PreparedData, folder: Path, seconds: float) -> str:
    """Counts of a prepared download.

    Args:
        data: its manifest.
        folder: of the shards.
        seconds: that it took.
    """
    skipped = sum(data.skipped.values())
    lines = [
        f"rows read       {data.rows_read:,}",
        f"rows kept       {data.rows:,}, in {len(data.shards):,} shards",
        f"images          {data.images:,}",
        f"rows skipped    {skipped:,}" + (f" ({skipped / data.rows_read:.1%})" if skipped else ""),
    ]
    if data.images_missing:
        lines.append(f"images missing  {data.images_missing:,}, which rows that were kept go on without")
    if data.dead_links:
        lines.append(f"dead links      {data.dead_links:,} images, by the download's own count")
    if data.files_left_out:
        lines.append(
            f"files left out  {len(data.files_left_out):,} of test and validation splits, such as "
            f"{data.files_left_out[0]}"
        )
    lines += [f"changed         {count:,} {CHANGES[name]}" for name, count in data.changes.items()]
    lines += [
        f"license         {count:,} {name or '(none)'}"
        for name, count in [*data.licenses.items()][:_LICENSES_SHOWN]
    ]
    if skipped:
        lines += [format_skipped(data), f"  more of them: {folder / SKIPPED}"]
    how = f"{seconds:,.1f} s ({data.rows_read / max(seconds, 1e-9):,.0f} rows/s)"
    lines.append(f"time            {how if data.new else 'it was finished already: nothing to do'}")
    lines.append(f"shards          {folder}/*.parquet")
    return "\n".join(lines)


def format_skipped(data: PreparedData) -> str:
    """The rows that were left out, by reason, most frequent first: what is wrong, what to do, and the first of them."""
    lines = []
    for name, count in sorted(data.skipped.items(), key=lambda item: -item[1]):
        reason = PREPARING_REASONS[name]
        lines += [f"  {count:>8,}  {name}: {reason.what}", f"            to do: {reason.remedy}"]
        for row in data.skipped_first.get(name, [])[:_ROWS_SHOWN]:
            names = "".join(f", {key} {row[key][:100]}" for key in ("id", "image") if row[key])
            lines.append(
                f"              row {row['row']} of {Path(row['file']).name}{names}: {row['detail']}"
            )
    return "\n".join(lines)
