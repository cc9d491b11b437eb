"""What `tools/preprocess_data.py` prints at its end: counts, the rows that were left out and why, what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.data.format.drawn import drawn_counts
from megatron_eve.data.format.manifest import SKIPPED, DatasetInfo
from megatron_eve.data.reasons import CHANGES, REASONS

_ROWS_SHOWN = 2  # of each reason
_LICENSES_SHOWN = 5


def format_summary(info: DatasetInfo, prefix: str) -> str:
    """Counts of a dataset that was just made, and the rows that were left out."""
    skipped = sum(info.skipped.values())
    lines = [
        f"rows read         {info.num_rows:,}",
        f"rows kept         {info.num_samples:,} ({info.num_cut:,} cut at {info.model_max_length:,} tokens)",
        f"images            {info.num_images:,}",
        f"tokens            {info.num_tokens:,} (text alone {info.num_text_tokens:,}; longest sample "
        f"{info.longest_length:,}, row {info.longest_sample} of the dataset)",
        f"tokens that train {info.num_labels:,}",
        f"bytes             {info.text_bytes + info.stored_bytes:,} "
        f"(text {info.text_bytes:,}, images {info.stored_bytes:,})",
        f"rows skipped      {skipped:,}" + (f" ({skipped / info.num_rows:.1%})" if skipped else ""),
    ]
    if (drawn := drawn_counts(info))[0]:
        lines.append(f"images to draw    {drawn[0]:,}, of {drawn[1]:,} rows")
    if info.num_missing_images:
        lines.append(
            f"images missing    {info.num_missing_images:,}, which documents that were kept go on without"
        )
    lines += [f"changed           {count:,} {CHANGES[name]}" for name, count in info.changes.items()]
    if info.licenses:
        most = sorted(info.licenses.items(), key=lambda item: -item[1])
        lines += [f"license           {count:,} {name}" for name, count in most[:_LICENSES_SHOWN]]
    if info.skipped:
        lines += [format_skipped(info.skipped, info.skipped_first), f"  all of them: {prefix}{SKIPPED}"]
    return "\n".join([*lines, f"dataset           {prefix}"])


def format_skipped(counts: Mapping[str, int], first: Mapping[str, list[dict[str, Any]]]) -> str:
    """The rows that were left out, by reason, most frequent first: what is wrong, what to do, and the first of them."""
    lines = []
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        reason = REASONS[name]
        lines += [f"  {count:>8,}  {name}: {reason.what}", f"            to do: {reason.remedy}"]
        for skipped in first[name][:_ROWS_SHOWN]:
            names = "".join(f", {key} {skipped[key][:100]}" for key in ("id", "image") if skipped[key])
            lines.append(
                f"              row {skipped['row']} of {Path(skipped['file']).name}{names}: {skipped['detail']}"
            )
    return "\n".join(lines)


def format_next(info: DatasetInfo, prefix: str, tokenizer_model: str, seconds: float) -> str:
    """How long it took, and the commands that come next.

    Args:
        info, prefix: of the dataset.
        tokenizer_model: that it was made with.
        seconds: that it took.
    """
    speed = info.num_rows / max(seconds, 1e-9)
    return "\n".join(
        [
            f"time              {seconds:,.1f} s ({speed:,.0f} rows/s)",
            f"to look at it     python tools/inspect_data.py {prefix} --tokenizer-model {tokenizer_model}",
            f"to train on it    --data-path {prefix} --tokenizer-model {tokenizer_model}",
        ]
    )
