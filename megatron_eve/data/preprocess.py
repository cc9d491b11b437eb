"""Rows of any source, and their pictures -> an indexed dataset. `tools/preprocess_data.py` is the command.

Every picture is decoded once here, completely, so that a run of days does not meet the damaged ones. What
cannot be used is left out, counted by reason and listed; what is kept keeps its order, whatever the number of
workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_eve.data.dataset_format import DatasetInfo, DatasetSettings
from megatron_eve.data.errors import DataError
from megatron_eve.data.indexed_writer import DatasetWriter
from megatron_eve.data.metadata import Exclusions
from megatron_eve.data.reasons import REASONS
from megatron_eve.data.row_encoder import EncodedRow, PreprocessConfig, RowEncoder, SkippedRow
from megatron_eve.data.sources.recognise import open_source
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.tokenizer import Tokenizer

__all__ = ["PreprocessConfig", "format_skipped", "format_summary", "preprocess"]

_FIRST_SKIPPED = 5  # rows that the summary names for each reason
_ESTIMATED_FROM = 1000  # samples, after which it is known about how large the dataset will be
_CHUNK = 16  # rows sent to a worker at a time
_CHUNKS_AHEAD = 3  # chunks in flight for each worker: enough to keep it busy, few enough to bound memory


def preprocess(config: PreprocessConfig, *, progress: bool = True) -> DatasetInfo:
    """Make the dataset at `config.output_prefix`, and OUT_skipped.jsonl with every row that was left out.

    Until the end everything has temporary names: a run that stops or is stopped leaves what was there before.

    Args:
        config: see PreprocessConfig.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: an input that cannot be read to its end, no row that can be kept, or a worker that died.
    """
    config.check()
    source = open_source(config.inputs, config.input_format, config.image_root)
    tokenizer = Tokenizer(config.tokenizer_model)
    if config.template == "plain":
        tokenizer.check_newline()
    settings = DatasetSettings(
        template=config.template,
        image_size=config.image_size,
        teacher_size=config.teacher_size,
        model_max_length=config.model_max_length,
        apply_exif=config.apply_exif,
        max_pixels=config.max_image_pixels,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        image_storage=config.image_storage,
    )
    Exclusions(tuple(config.drop_license), config.opt_out)  # its mistakes are said before any work
    storage = config.storage()
    if storage is not None and (notice := storage.notice()):
        print(notice, file=sys.stderr)
    with (
        DatasetWriter(config.output_prefix, settings, storage.made_with() if storage else None) as writer,
        _SkippedLog(config.output_prefix) as skipped,
        _progress_bar(source.num_bytes, progress) as bar,
    ):
        for result in _encode_all(config, source, source.rows()):
            if isinstance(result, SkippedRow):
                skipped.add(result)
            else:
                writer.add_sample(
                    result.tokens, result.labels, result.images, cut=result.cut, meta=result.meta
                )
                if writer.num_samples == _ESTIMATED_FROM:
                    _check_disk(config.output_prefix, writer.num_bytes, source)
            bar.set_postfix(kept=writer.num_samples, skipped=skipped.total, refresh=False)
            bar.update(source.position - bar.n)
        if writer.num_samples == 0:
            raise DataError(
                f"no row of {' '.join(config.inputs)} can be used ({skipped.total} skipped); no dataset was written.\n"
                + format_skipped(skipped.counts, skipped.first)
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


def _check_disk(prefix: str, written: int, source: Source) -> None:
    """Refuse a dataset that the disk has no room for, rather than fill it.

    Args:
        prefix: of the dataset.
        written: bytes of it so far.
        source: of which so much has been read; a little more than was written, as rows are read ahead.

    Raises:
        DataError: there is no room.
    """
    folder = Path(prefix).absolute().parent
    rest = written * max(source.num_bytes / max(source.position, 1) - 1, 0)
    free = shutil.disk_usage(folder).free
    if rest > free:
        raise DataError(
            f"{prefix} would take about {(written + rest) / 2**30:,.1f} GiB, by its first {_ESTIMATED_FROM:,} rows, "
            f"and the disk of {folder} has {free / 2**30:,.1f} GiB left: make room, choose another --output-prefix, or "
            "store less (--image-storage)"
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


def _encode_all(
    config: PreprocessConfig, source: Source, rows: Iterable[RawRow]
) -> Iterator[EncodedRow | SkippedRow]:
    """Encode rows, in order. Reads only so far ahead as keeps the workers busy."""
    if config.workers == 1:
        encoder, alone = RowEncoder(config, source), iter(rows)
        while chunk := list(islice(alone, _CHUNK)):
            yield from encoder.encode_chunk(chunk)
        return
    left = iter(rows)
    pending: deque[Future[list[EncodedRow | SkippedRow]]] = deque()
    pool = ProcessPoolExecutor(
        config.workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(config, source),
    )
    try:
        while chunk := list(islice(left, _CHUNK)):
            pending.append(pool.submit(_encode_chunk, chunk))
            if len(pending) >= _CHUNKS_AHEAD * config.workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker died while reading {' '.join(config.inputs)}, it may have run out of memory: "
            "use fewer --workers or a smaller --max-image-pixels"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: RowEncoder | None = None  # of a worker process


def _start_worker(config: PreprocessConfig, source: Source) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent sees to the end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = RowEncoder(config, source)


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for rows for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_chunk(rows: list[RawRow]) -> list[EncodedRow | SkippedRow]:
    assert _encoder is not None
    return _encoder.encode_chunk(rows)
