"""Tar shards of images and videos: downloads of img2dataset and video2dataset, and SA-1B as published.

img2dataset (github.com/rom1504/img2dataset): 000000000.jpg, .txt (the caption) and .json (url, caption, key, status,
width, height, original_width, original_height, exif, sha256, and the columns that were requested, such as LICENSE).
video2dataset (github.com/iejMac/video2dataset): the same with .mp4 in place of .jpg.
SA-1B (github.com/facebookresearch/segment-anything): sa_<id>.jpg and sa_<id>.json {image, annotations}; no captions.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.format.sample_block import MAX_ROW_BYTES
from megatron_eve.data.schema import ImageFile, Record, VideoFile
from megatron_eve.data.sources.fields import (
    MAX_TEXT,
    VIDEO_SUFFIXES,
    caption_beside,
    drawn_of,
    meta_beside,
    parse_object,
    source_name,
)
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.sources.tar import Member, check_archive, members
from megatron_eve.models.text_format import IMAGE_TOKEN

_PICTURES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2"})
_MAX_MEMBERS = 1000  # inspected per key, so that a shard of one key does not fill the memory
_SA1B_HEAD = 1 << 16  # bytes; the key "image" comes first, followed by hundreds of KB of masks
_SA1B_IMAGE = re.compile(r'\s*\{\s*"image"\s*:\s*(?=\{)')
_SA1B_ANNOTATIONS = re.compile(r'\s*,\s*"annotations"\s*:')


class _RowMembers(NamedTuple):
    """Members of one row as (name, offset, size). `picture` is the image, or the video if `is_video`."""

    key: str
    picture: tuple[str, int, int]
    is_video: bool
    caption: tuple[str, int, int] | None
    metadata: tuple[str, int, int] | None


class WebdatasetSource(Source):
    """Pairs of an image or a video and a caption, from tar shards.

    The members of a row share a key, the name up to the first dot after the last slash, and are adjacent in the shard
    (github.com/webdataset/webdataset). A row without .txt takes the caption of its .json; a row without either, as in
    SA-1B, has an empty caption. `meta` is the content of the .json without exif. Its `sha256` is that of the downloaded
    file, which img2dataset then resized, so it is not the digest of the image in the shard. If a key has both a video
    and an image, the video is used. `"draw": true` in the .json says that it is to be drawn from the caption.

    Args:
        files: uncompressed tar archives.
        image_root: not used, images are in the archives.

    Raises:
        DataError: while iterating, a file is not a complete, uncompressed tar archive. All files are checked first.
    """

    def __init__(self, files: Sequence[Path], image_root: str | None = None) -> None:
        super().__init__(files, image_root)
        self._open: tuple[str, int] | None = None

    def rows(self) -> Iterator[RawRow]:
        """One row for each key."""
        # Check all files first: a broken one must not stop the command after hours of work.
        for file in self._files:
            check_archive(file)
        before = 0
        for file in self._files:
            name = str(file)
            for number, group in enumerate(_groups(members(file)), start=1):
                self._position = before + group[-1].offset + group[-1].size
                yield RawRow(name, number, [tuple(member) for member in group])
            before += file.stat().st_size
            self._position = before

    def _make_record(self, row: RawRow) -> Record:
        found = _members_of_row([Member(*member) for member in row.payload])
        try:
            return self._record(row, found)
        except SkipRow as skip:
            skip.id, skip.image = found.key, found.picture[0]
            raise

    def _record(self, row: RawRow, found: _RowMembers) -> Record:
        meta = self._metadata(row.file, found.metadata)
        text = None if found.caption is None else self._text(row.file, found.caption)
        changes: Counter[str] = Counter()
        caption = caption_beside(text, found.caption[0] if found.caption else "", meta, changes)
        name, data = found.picture[0], self._read(row.file, *found.picture)
        return Record(
            id=found.key,
            source=source_name(row.file),
            kind="pair",
            images=[] if found.is_video else [ImageFile(data, path=name)],
            turns=[{"from": "gpt", "value": caption if found.is_video else IMAGE_TOKEN + caption}],
            meta=meta_beside(meta),
            video=VideoFile(data, name) if found.is_video else None,
            changes=changes,
            drawn=drawn_of(meta, 0 if found.is_video else 1),
        )

    def _metadata(self, file: str, member: tuple[str, int, int] | None) -> dict[str, Any]:
        if member is None:
            return {}
        name, offset, size = member
        head = self._read(file, name, offset, min(size, _SA1B_HEAD))
        image = _sa1b_image(head)
        if image is not None:
            return image
        if size > len(head):
            head = self._text(file, member)
        return parse_object(head, name)

    def _text(self, file: str, member: tuple[str, int, int]) -> bytes:
        name, offset, size = member
        if size > MAX_TEXT:
            raise SkipRow("member_too_large", f"{name} has {size} bytes, more than {MAX_TEXT >> 20} MiB")
        return self._read(file, name, offset, size)

    def _read(self, file: str, name: str, offset: int, size: int) -> bytes:
        """Bytes of a member; the archive stays open for the next row."""
        try:
            if self._open is None or self._open[0] != file:
                self.close()
                self._open = (file, os.open(file, os.O_RDONLY))
            parts, left = [], size
            while left:  # pread returns at most 2 GiB, and on some file systems less than requested
                part = os.pread(self._open[1], left, offset + size - left)
                if not part:
                    raise SkipRow("image_unreadable", f"{name}: the archive ends before it")
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise SkipRow("image_unreadable", f"{name} in {file}: {error.strerror}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the archive that is open for reading."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self.close()


def _key(name: str) -> tuple[str, str]:
    """Key and lower-case suffix; an empty suffix for members of no row, such as LICENSE or ._000.jpg."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def _groups(found: Iterator[Member]) -> Iterator[list[Member]]:
    """Groups of adjacent members with one key; regular files that belong to no row are skipped."""
    group: list[Member] = []
    last = None
    for member in found:
        key, suffix = _key(member.name)
        if not suffix and member.problem is None:
            continue
        if group and key != last:
            yield group
            group = []
        last = key
        if len(group) < _MAX_MEMBERS:
            group.append(member)
    if group:
        yield group


def _members_of_row(group: list[Member]) -> _RowMembers:
    """Find the image or video, the caption and the metadata among the members of a key.

    Raises:
        SkipRow: the members do not form a row.
    """
    found: dict[str, tuple[str, int, int]] = {}
    key = ""
    for member in group:
        if member.problem is not None:
            raise SkipRow(*member.problem)
        key, suffix = _key(member.name)
        part = "picture" if suffix in _PICTURES else "video" if f".{suffix}" in VIDEO_SUFFIXES else suffix
        if part in found and part in ("picture", "video", "txt", "json"):
            raise SkipRow("key_twice", f"{found[part][0]} and {member.name} have one key")
        found[part] = (member.name, member.offset, member.size)
    picture = found.get("video", found.get("picture"))
    if picture is None:
        names = ", ".join(member.name for member in group[:5])
        raise SkipRow("key_without_picture", f"{names:.200} without an image beside it")
    if picture[2] > MAX_ROW_BYTES:
        raise SkipRow("image_file_too_large", f"{picture[0]} has {picture[2]} bytes")
    return _RowMembers(key, picture, "video" in found, found.get("txt"), found.get("json"))


def _sa1b_image(head: bytes) -> dict[str, Any] | None:
    """The object "image" at the beginning of a JSON file of SA-1B; None for other JSON. Masks are not parsed."""
    text = head.decode("utf-8", "replace")
    begin = _SA1B_IMAGE.match(text)
    if begin is None:
        return None
    try:
        image, end = json.JSONDecoder().raw_decode(text, begin.end())
    except (ValueError, RecursionError):
        return None
    return image if _SA1B_ANNOTATIONS.match(text, end) else None
