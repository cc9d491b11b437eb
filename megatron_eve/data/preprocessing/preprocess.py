"""Rows of any source, and their pictures -> an indexed dataset. `tools/preprocess_data.py` is the command.

Every picture is decoded once here, completely, so that a run of days does not meet the damaged ones. What
cannot be used is left out, counted by reason and listed; what is kept keeps its order, whatever the number of
workers.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.format.manifest import DatasetInfo
from megatron_eve.data.format.metadata import Exclusions
from megatron_eve.data.preprocessing.encoders import encode_rows
from megatron_eve.data.preprocessing.row_encoder import PreprocessConfig, SkippedRow
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.sources.recognise import open_source
from megatron_eve.data.sources.source import Source
from megatron_eve.data.text.tokenizer import Tokenizer

__all__ = ["PreprocessConfig", "format_skipped", "format_summary", "preprocess"]

_FIRST_SKIPPED = 5  # rows that the summary names for each reason
_BAR_SECONDS = 0.2  # between two counts that the bar shows: making their text costs as much as some rows
_ESTIMATED_FROM = 1000  # samples, after which it is known about how large the dataset will be


def preprocess(config: PreprocessConfig, *, progress: bool = True) -> DatasetInfo:
    """Make the dataset at `config.output_prefix`, and OUT_skipped.jsonl with every row that was left out.

    Until the end everything has temporary names: a run that stops or is stopped leaves what was there before.

    Args:
        config: see PreprocessConfig.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: an input that cannot be read to its end, no row that can be kept, a worker that died, or a disk that
            is full.
    """
    try:
        return _preprocess(config, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = Path(config.output_prefix).absolute().parent
        raise DataError(
            f"{error.strerror} in {folder}: no dataset was written; make room, choose another --output-prefix, "
            "or store less (--image-storage)"
        ) from error


def _preprocess(config: PreprocessConfig, progress: bool) -> DatasetInfo:
    config.check()
    source = open_source(config.inputs, config.input_format, config.image_root)
    tokenizer = Tokenizer(config.tokenizer_model)
    if config.template == "plain":
        tokenizer.check_newline()
    settings = config.dataset_settings(tokenizer)
    Exclusions(tuple(config.drop_license), config.opt_out)  # its mistakes are said before any work
    storage = config.storage()
    if storage is not None and (notice := storage.notice()):
        print(notice, file=sys.stderr)
    with (
        DatasetWriter(config.output_prefix, settings, storage.made_with() if storage else None) as writer,
        _SkippedLog(config.output_prefix) as skipped,
        _progress_bar(source.num_bytes, progress) as bar,
    ):
        room_is_checked, shown = False, 0.0
        for chunk in encode_rows(config, source, source.rows(), writer.image_path):
            for row in chunk.skipped:
                skipped.add(row)
            if chunk.block is not None:
                chunk.write_images(writer.add_block(chunk.block))
            if not room_is_checked and writer.num_samples >= _ESTIMATED_FROM:
                room_is_checked = True
                _check_disk(config.output_prefix, writer, source)
            if time.monotonic() >= shown + _BAR_SECONDS:
                shown = time.monotonic()
                bar.set_postfix(kept=writer.num_samples, skipped=skipped.total, refresh=False)
            bar.update(source.position - bar.n)
        bar.set_postfix(kept=writer.num_samples, skipped=skipped.total)
        if writer.num_samples == 0:
            raise DataError(
                f"no row of {' '.join(config.inputs)} can be used ({skipped.total} skipped); no dataset was written.\n"
                f"{format_skipped(skipped.counts, skipped.first)}".rstrip()
            )
        skipped.close()
        return writer.finalise(
            num_rows=writer.num_samples + skipped.total, skipped=skipped.counts, skipped_first=skipped.first
        )


def format_summary(info: DatasetInfo, prefix: str) -> str:
    """What a person wants to know about a dataset that was just made."""
    lines = [
        f"rows read         {info.num_rows:,}",
        f"rows kept         {info.num_samples:,} ({info.num_cut:,} cut at {info.model_max_length:,} tokens)",
        f"images            {info.num_images:,}",
        f"tokens            {info.num_tokens:,} (text alone {info.num_text_tokens:,}; longest sample "
        f"{info.longest_length:,}, row {info.longest_sample} of the dataset)",
        f"tokens that train {info.num_labels:,}",
        f"bytes             {info.text_bytes + info.stored_bytes:,} "
        f"(text {info.text_bytes:,}, images {info.stored_bytes:,})",
        f"rows skipped      {sum(info.skipped.values()):,}",
    ]
    if info.num_missing_images:
        lines.append(
            f"images missing    {info.num_missing_images:,}, which documents that were kept go on without"
        )
    if info.licenses:
        most = sorted(info.licenses.items(), key=lambda item: -item[1])
        lines += [f"license           {count:,} {name}" for name, count in most[:_FIRST_SKIPPED]]
    if info.skipped:
        lines += [format_skipped(info.skipped, info.skipped_first), f"  all of them: {prefix}_skipped.jsonl"]
    return "\n".join([*lines, f"dataset           {prefix}"])


def format_skipped(counts: Mapping[str, int], first: Mapping[str, list[dict[str, Any]]]) -> str:
    """The rows that were left out, by reason, most frequent first, with the first few of each."""
    lines = []
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:>8,}  {reason}: {REASONS[reason]}")
        for skipped in first[reason]:
            names = "".join(f", {key} {skipped[key]}" for key in ("id", "image") if skipped[key])
            lines.append(
                f"              row {skipped['row']} of {Path(skipped['file']).name}{names}: {skipped['detail']}"
            )
    return "\n".join(lines)


def _check_disk(prefix: str, writer: DatasetWriter, source: Source) -> None:
    """Refuse a dataset that the disk has no room for, rather than fill it.

    Args:
        prefix: of the dataset.
        writer: of it, with its first samples.
        source: of which so much has been read; a little more than was written, as rows are read ahead.

    Raises:
        DataError: there is no room.
    """
    folder = Path(prefix).absolute().parent
    written = writer.num_bytes
    rest = written * max(source.num_bytes / max(source.position, 1) - 1, 0)
    free = shutil.disk_usage(folder).free
    if rest > free:
        raise DataError(
            f"{prefix} would take about {(written + rest) / 2**30:,.1f} GiB, by its first {writer.num_samples:,} "
            f"samples, and the disk of {folder} has {free / 2**30:,.1f} GiB left: make room, choose another "
            "--output-prefix, or store less (--image-storage)"
        )


class _SkippedLog:
    """OUT_skipped.jsonl under a temporary name, and the counts for the manifest."""

    def __init__(self, prefix: str) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[dict[str, Any]]] = {}
        self._path = Path(f"{prefix}_skipped.jsonl")
        self._partial = Path(f"{self._path}.partial")
        self._file = self._partial.open("w", encoding="utf-8")

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, skipped: SkippedRow) -> None:
        record = {
            "file": skipped.file,
            "row": skipped.row,
            "reason": skipped.reason,
            "detail": skipped.detail,
        }
        record |= {"id": skipped.id, "image": skipped.image}
        self.counts[skipped.reason] += 1
        first = self.first.setdefault(skipped.reason, [])
        if len(first) < _FIRST_SKIPPED:
            first.append(record)
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()
        self._partial.replace(self._path)

    def __enter__(self) -> _SkippedLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:  # else the name may be another run's by now
            self._file.close()
            self._partial.unlink(missing_ok=True)


def _progress_bar(num_bytes: int, shown: bool) -> Any:
    """A bar over the bytes of the input: rows are not known beforehand."""
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file is not for redrawing
    return tqdm(
        total=num_bytes, unit="B", unit_scale=True, desc="preprocess", disable=not shown, mininterval=interval
    )
