"""`ShardWriter`, which makes one shard: parses its rows, reads their pictures, and counts what is kept and why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_eve.curation.preparing.config import PrepareConfig
from megatron_eve.curation.preparing.output import ShardCounts, shard_path, write_counts
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.format.metadata import Exclusions, license_of
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.parquet import write_records
from megatron_eve.data.sources.source import RawRow, Source

_LISTED = (
    100  # rows of a shard that are listed for each reason, since most rows of a download may be left out
)


class ShardWriter:
    """Writes shards; one for each process.

    Args:
        config: of the command.
        source: of the rows.
    """

    def __init__(self, config: PrepareConfig, source: Source) -> None:
        self._config = config
        self._source = source
        self._root = config.preparer.image_root
        self._excluded = Exclusions(config.drop_license, config.opt_out)

    def write(self, shard: int, rows: list[RawRow]) -> int:
        """Write a shard, then its counts. Without a row to keep there is no parquet file.

        Args:
            shard: its number.
            rows: of the download.

        Returns:
            The number of rows of the download.
        """
        counts = ShardCounts(rows_read=len(rows))
        records = self._records(rows, counts)
        first = next(records, None)
        if first is not None:
            counts.rows = write_records(shard_path(self._config.output, shard), chain([first], records))
        write_counts(self._config.output, shard, counts)
        return len(rows)

    def _records(self, rows: list[RawRow], counts: ShardCounts) -> Iterator[Record]:
        for row in rows:
            name = None
            try:
                record = self._source.record(row)
                name = record.id
                record = self._complete(record, row)
            except SkipRow as skip:
                counts.skipped[skip.reason] += 1
                if counts.skipped[skip.reason] <= _LISTED:
                    counts.skipped_rows.append(
                        {
                            "file": row.file,
                            "row": row.number,
                            "reason": skip.reason,
                            "detail": _printable(skip.detail),
                            "id": _printable(name or skip.id),
                            "image": _printable(skip.image),
                        }
                    )
                continue
            counts.add(record)
            yield record

    def _complete(self, record: Record, row: RawRow) -> Record:
        """A record with its source, its license and the bytes of its pictures.

        Raises:
            SkipRow: it is excluded, a picture cannot be read, or it cannot be stored.
        """
        preparer = self._config.preparer
        meta: dict[str, Any] = {**record.meta, "source_file": Path(row.file).name}
        if license_of(meta) is None and preparer.license is not None:
            meta["license"] = preparer.license
        name = None if record.id is None else _storable(record.id)
        record = replace(record, id=name, source=_storable(record.source), meta=meta)
        self._excluded.check(record)
        if record.video is not None:
            raise SkipRow("other_media", f"the video {record.video.path}, of which a shard has no column")
        _check_turns(record.turns)
        return replace(record, images=[self._with_bytes(one) for one in record.images])

    def _with_bytes(self, image: ImageFile) -> ImageFile:
        data = image.data
        if data is None:
            root = str(self._root or self._config.preparer.folder)
            data = read_image_file(root, str(image.path), self._config.follow_links)
        self._excluded.check_file(data)
        return replace(image, data=data, path=None if image.path is None else _storable(image.path))


def _check_turns(turns: object) -> None:
    """Refuse what the column of turns cannot hold; what turns say is validated by tools/preprocess_data.py.

    Raises:
        SkipRow: the turns are not a list of objects with the texts "from" and "value".
    """
    if not isinstance(turns, list) or not turns:
        raise SkipRow("no_conversation", "there are no turns")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise SkipRow("unknown_role", f"{turn!r:.80}")
        if not isinstance(turn.get("value"), str):
            raise SkipRow("value_not_text", f"{turn.get('value')!r:.80}")
        try:
            (turn["from"] + turn["value"]).encode("utf-8")
        except UnicodeEncodeError:
            raise SkipRow("text_not_unicode", f"half of a surrogate pair in {turn['value']!r:.80}") from None


def _storable(text: str) -> str:
    """A name without halves of surrogate pairs, which JSON may hold and a column may not; each becomes "?"."""
    return text.encode("utf-8", "replace").decode()


def _printable(value: object) -> str | None:
    """Text for a list that people read: control characters and halves of surrogate pairs as escapes."""
    if value is None:
        return None
    text = str(value)[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
