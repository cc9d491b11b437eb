"""Parquet: shards of records (`data/schema.py`), and data sets of the Hugging Face hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.sample_block import MAX_ROW_BYTES
from megatron_eve.data.schema import KINDS, ImageFile, Record
from megatron_eve.data.sources import conversation_rows
from megatron_eve.data.sources.fields import DRAW_KEY, drawn_of, parse_object, plain_text, source_name
from megatron_eve.data.sources.image_files import image_file
from megatron_eve.data.sources.row_groups import UNREADABLE, RowGroupReader, one_line, open_file
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.models.text_format import IMAGE_TOKEN

ARROW_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("source", pyarrow.string()),
        ("kind", pyarrow.string()),
        (
            "images",
            pyarrow.list_(
                pyarrow.struct(
                    [("bytes", pyarrow.binary()), ("path", pyarrow.string()), ("sha256", pyarrow.string())]
                )
            ),
        ),
        (
            "turns",
            pyarrow.list_(pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())])),
        ),
        ("meta", pyarrow.string()),
        ("draw", pyarrow.list_(pyarrow.bool_())),
    ]
)
"""Columns of a shard of records; `meta` is the text of a JSON object."""

# Column names of an image and its caption in data sets of the hub and in img2dataset's parquet output.
_PICTURES = ("image", "images", "jpg", "png", "webp")
_CAPTIONS = ("caption", "text", "txt", "TEXT", "captions")
_ROW_GROUP_BYTES = 32 << 20  # small, since a worker decodes a group from its start
_ROW_BYTES = 1024  # estimate for everything in a row except images and text


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write a shard of records and return their number. The file has a temporary name until it is complete.

    Args:
        path: of the shard, `*.parquet`.
        records: in order. A row group holds one row, or at most 32 MiB of images and text. Videos must have been
            replaced by their frames (`frame_rows.with_frames`), since a shard has no column for videos.
    """
    partial = Path(f"{path}.partial")
    rows: list[dict[str, Any]] = []
    count = size = 0
    try:
        # Few rows per page: readers hold at least one page, which by default is as large as the row group.
        with parquet.ParquetWriter(partial, ARROW_SCHEMA, write_batch_size=16) as writer:
            for record in records:
                added = sum(len(image.data or b"") for image in record.images)
                added += sum(len(turn["value"]) for turn in record.turns) + _ROW_BYTES
                if rows and size + added > _ROW_GROUP_BYTES:
                    writer.write_table(pyarrow.Table.from_pylist(rows, ARROW_SCHEMA))
                    rows, size = [], 0
                rows.append(_row_of(record))
                count, size = count + 1, size + added
            if rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, ARROW_SCHEMA))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def count_rows(file: Path) -> int:
    """Number of rows of a parquet file.

    Raises:
        DataError: it is not parquet, is truncated, or has columns that `ParquetSource` does not take.
    """
    _columns(file)
    return sum(_row_counts(file))


class ParquetSource(Source):
    """Rows of parquet files, which all have the same columns.

    The columns decide what a row becomes:

    - those of ARROW_SCHEMA: a record;
    - `conversations`, a list of `{from, value}`, or `messages`, of `{role, content}`, with or without images: a
      conversation (`conversation_rows`);
    - an image (image, images, jpg ...) and a caption (caption, text, txt ...): a pair.

    A column `draw`, of true and false or of lists of them, says which images are to be drawn. An image is bytes,
    `{bytes, path}` as on the hub, a path under `image_root`, or a list of these. Other columns of
    numbers and strings go into `meta`.

    Args:
        files: parquet files.
        image_root: folder that paths are relative to.

    Raises:
        DataError: while iterating, a file is not parquet, is truncated, or has other columns than these. The metadata
            of all files is checked first.
    """

    def __init__(self, files: Sequence[Path], image_root: str | None = None) -> None:
        super().__init__(files, image_root)
        self._opened: tuple[str, parquet.ParquetFile, list[str]] | None = None
        self._group: RowGroupReader | None = None

    def rows(self) -> Iterator[RawRow]:
        """All rows, each as its row group and its number in it; `record` reads the content."""
        for file in self._files:
            _columns(file)
        before = 0
        for file in self._files:
            size, number = file.stat().st_size, 0
            counts = _row_counts(file)
            total = sum(counts)
            for group, count in enumerate(counts):
                for row in range(count):
                    number += 1
                    self._position = before + size * number // total
                    yield RawRow(str(file), number, (group, row))
            before += size
            self._position = before

    def _make_record(self, row: RawRow) -> Record:
        group, number = row.payload
        try:
            fields = self._row_group(row.file, group, number).row(number)
        except UNREADABLE as error:
            raise DataError(
                f"{row.file}, row {row.number}: it cannot be read further ({one_line(error)}); {_remedy(error)}"
            ) from error
        try:
            for layout, record in _LAYOUTS:
                if layout(fields.keys()):
                    return record(row, fields)
        except SkipRow as skip:
            skip.id = None if fields.get("id") is None else str(fields["id"])
            raise
        raise AssertionError(f"columns {list(fields)} were accepted and fit no layout")

    def _row_group(self, file: str, group: int, row: int) -> RowGroupReader:
        """Reader of a row group that can return `row`. The footer of a file is read once for all its groups."""
        if self._opened is None or self._opened[0] != file:
            self._opened, self._group = (file, open_file(file), _columns(Path(file))), None
        if self._group is None or not self._group.holds(group, row):
            self._group = RowGroupReader(self._opened[1], group, self._opened[2])
        return self._group


def _row_of(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "kind": record.kind,
        "images": [{"bytes": one.data, "path": one.path, "sha256": one.sha256} for one in record.images],
        "turns": [{"from": turn["from"], "value": turn["value"]} for turn in record.turns],
        "meta": json.dumps(dict(record.meta)),
        "draw": list(record.drawn_images) if any(record.drawn_images) else None,
    }


def _row_counts(file: Path) -> list[int]:
    """Rows of each row group; raises DataError as `_columns`."""
    try:
        metadata = parquet.read_metadata(file)
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except UNREADABLE as error:
        raise DataError(
            f"{file} is not a complete parquet file ({one_line(error)}): {_remedy(error)}"
        ) from error


def _columns(file: Path) -> list[str]:
    """Names of the columns of a file that are read.

    Raises:
        DataError: the file is not parquet, or its columns fit no layout.
    """
    try:
        schema = parquet.read_schema(file)
    except UNREADABLE as error:
        raise DataError(
            f"{file} is not a complete parquet file ({one_line(error)}): {_remedy(error)}"
        ) from error
    if not any(layout(schema.names) for layout, _ in _LAYOUTS):
        raise DataError(
            f"{file} has the columns {one_line(', '.join(schema.names))}: a source needs an image "
            f"({', '.join(_PICTURES)}) and a caption ({', '.join(_CAPTIONS)}), 'conversations', 'messages', or those "
            "of docs/data.md; rename its columns"
        )
    used = {*ARROW_SCHEMA.names, *conversation_rows.KEYS, *_PICTURES, *_CAPTIONS}
    return [field.name for field in schema if field.name in used or _is_metadata_column(field.type)]


def _is_metadata_column(kind: pyarrow.DataType) -> bool:
    """Whether the values of a column of this type go into `meta`."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        is_kind(kind)
        for is_kind in (
            types.is_integer,
            types.is_floating,
            types.is_boolean,
            types.is_string,
            types.is_large_string,
            types.is_string_view,
        )
    )


def _has_record(names: Iterable[str]) -> bool:
    return {"kind", "images", "turns"} <= set(names)


def _has_conversation(names: Iterable[str]) -> bool:
    return not set(names).isdisjoint(conversation_rows.KEYS)


def _has_pair(names: Iterable[str]) -> bool:
    return _first(_PICTURES, names) is not None and _first(_CAPTIONS, names) is not None


def _first(wanted: Sequence[str], names: Iterable[str]) -> str | None:
    there = set(names)
    return next((name for name in wanted if name in there), None)


def _record(row: RawRow, fields: dict[str, Any]) -> Record:
    if fields["kind"] not in KINDS:
        raise SkipRow("parquet_row", f"kind is {fields['kind']!r:.80}, not one of {', '.join(KINDS)}")
    given = {key: fields.get(key) for key in ("meta", "source")}
    for key, value in given.items():
        if not isinstance(value, str | None):
            raise SkipRow("parquet_row", f"{key} is {type(value).__name__}, not text")
    meta = parse_object((given["meta"] or "{}").encode(), "meta")
    source = given["source"] or source_name(row.file)
    images, kind = _pictures(fields["images"]), fields["kind"]
    # Several images of a caption are the frames of a video.
    is_video = kind in ("pair", "generation") and len(images) > 1
    drawn = drawn_of(fields, len(images))
    return Record(_id(fields), source, kind, images, fields["turns"], meta, drawn=drawn, is_video=is_video)


def _conversation(row: RawRow, fields: dict[str, Any]) -> Record:
    name = _first(_PICTURES, fields)
    given = None if name is None else fields[name]
    said = conversation_rows.read_conversation(fields, [] if given is None else _pictures(given))
    meta = _meta(fields, (said.key, name, DRAW_KEY))
    drawn = drawn_of(fields, len(said.images))
    return Record(
        _id(fields), source_name(row.file), "conversation", said.images, said.turns, meta, drawn=drawn
    )


def _pair(row: RawRow, fields: dict[str, Any]) -> Record:
    name, caption = _first(_PICTURES, fields), _first(_CAPTIONS, fields)
    assert name is not None and caption is not None
    images = _pictures(fields[name])
    if len(images) != 1:
        raise SkipRow("parquet_row", f"{name} holds {len(images)} images, and a caption belongs to one")
    changes: Counter[str] = Counter()
    text = plain_text("" if fields[caption] is None else fields[caption], caption, changes)
    turns = [{"from": "gpt", "value": IMAGE_TOKEN + text}]
    meta = _meta(fields, (name, caption, DRAW_KEY))
    drawn = drawn_of(fields, len(images))
    return Record(
        _id(fields), source_name(row.file), "pair", images, turns, meta, changes=changes, drawn=drawn
    )


_LAYOUTS: tuple[tuple[Callable[[Iterable[str]], bool], Callable[[RawRow, dict[str, Any]], Record]], ...] = (
    (_has_record, _record),
    (_has_conversation, _conversation),
    (_has_pair, _pair),
)


def _id(fields: dict[str, Any]) -> str | None:
    return None if fields.get("id") is None else str(fields["id"])


def _meta(fields: dict[str, Any], used: Sequence[str | None]) -> dict[str, Any]:
    kinds = (str, int, float, bool)
    return {
        key: value for key, value in fields.items() if key not in (*used, "id") and isinstance(value, kinds)
    }


def _pictures(value: object) -> list[ImageFile]:
    """Convert the value of an image column to image files.

    Raises:
        SkipRow: an image is null, too large, or neither bytes nor a path.
    """
    found = []
    for one in value if isinstance(value, list) else [value]:
        given: dict[str, Any] = (
            one if isinstance(one, dict) else {"path" if isinstance(one, str) else "bytes": one}
        )
        data, path, digest = (given.get(key) for key in ("bytes", "path", "sha256"))
        if data is None and not path:
            raise SkipRow("parquet_row", "an image is null: neither bytes nor a path")
        if not isinstance(data, bytes | None) or not isinstance(path, str | None):
            raise SkipRow("parquet_row", f"an image is {type(data or path).__name__}, not bytes")
        if not isinstance(digest, str | None):
            raise SkipRow("parquet_row", f"the sha256 of an image is {type(digest).__name__}, not text")
        if data is not None and len(data) > MAX_ROW_BYTES:
            raise SkipRow("image_file_too_large", f"{path or 'an image'} has {len(data)} bytes")
        found.append(
            replace(image_file(str(path)), sha256=digest) if data is None else ImageFile(data, path, digest)
        )
    return found


def _remedy(error: Exception) -> str:
    """Remedy for a file that cannot be read."""
    if "decrypt" in str(error).lower():
        return "it is encrypted, write it again without that"
    return "copy or download it again"
