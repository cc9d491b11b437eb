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
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.format.manifest import SKIPPED, DatasetInfo
from megatron_eve.data.format.metadata import Exclusions
from megatron_eve.data.format.output import check_output, refuse_existing
from megatron_eve.data.preprocessing.config import PreprocessConfig
from megatron_eve.data.preprocessing.encoders import encode_rows
from megatron_eve.data.preprocessing.row_encoder import SkippedRow
from megatron_eve.data.preprocessing.summary import format_skipped
from megatron_eve.data.sources.recognise import open_source
from megatron_eve.data.sources.source import Source

__all__ = ["PreprocessConfig", "preprocess"]

_FIRST_SKIPPED = 5  # rows that the manifest names for each reason
_BAR_SECONDS = 0.2  # between two counts that the bar shows: making their text costs as much as some rows
_ESTIMATED_FROM = 1000  # samples, after which it is known about how large the dataset will be


def preprocess(config: PreprocessConfig, *, progress: bool = True) -> DatasetInfo:
    """Make the dataset at `config.output_prefix`, and OUT_skipped.jsonl with every row that was left out.

    Until the end everything has temporary names: a run that stops or is stopped leaves what was there before. A dataset
    that is there is refused, or, with `config.overwrite`, replaced at the end.

    Args:
        config: see PreprocessConfig.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: a dataset that is there, an input that cannot be read to its end, no row that can be kept, a worker
            that died, or a disk that is full.
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
    check_output(config.output_prefix, config.overwrite)
    source = open_source(config.inputs, config.input_format, config.image_root)
    settings = config.dataset_settings(config.tokenizer())
    Exclusions(tuple(config.drop_license), config.opt_out)  # its mistakes are said before any work
    storage = config.storage()
    if storage is not None and (notice := storage.notice()):
        print(notice, file=sys.stderr)
    with (
        DatasetWriter(config.output_prefix, settings, storage.made_with() if storage else None) as writer,
        _SkippedLog(config.output_prefix) as skipped,
        _progress_bar(source.num_bytes, progress) as bar,
    ):
        if not config.overwrite:
            refuse_existing(
                config.output_prefix
            )  # another run may have made one before this one had the lock
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
        self._path = Path(prefix + SKIPPED)
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
