"""Video files with caption and metadata in files of the same name: clip.mp4, clip.txt, clip.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record, VideoFile
from megatron_eve.data.sources.fields import (
    MAX_TEXT,
    caption_beside,
    drawn_of,
    meta_beside,
    parse_object,
    source_name,
)
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.source import RawRow, Source


class VideoSource(Source):
    """One pair of a video and its caption for each file.

    The caption is the .txt file, else the caption in the .json file, else empty. `meta` is the content of the .json;
    `"draw": true` in it says that the video is to be drawn from the caption.

    Args:
        files: video files.
        image_root: not used.
    """

    def rows(self) -> Iterator[RawRow]:
        """One row for each file; no file is opened."""
        for file in self._files:
            self._position += file.stat().st_size
            yield RawRow(str(file), 1, None)

    def _make_record(self, row: RawRow) -> Record:
        """Read the video, its caption and its metadata.

        Raises:
            SkipRow: one of the files cannot be read.
        """
        file = Path(row.file)
        try:
            about, text = _beside(file, ".json"), _beside(file, ".txt")
            meta = {} if about is None else parse_object(about, file.with_suffix(".json").name)
            changes: Counter[str] = Counter()
            caption = caption_beside(text, file.with_suffix(".txt").name, meta, changes)
            data = read_image_file(str(file.parent.resolve()), file.name, follow_links=True)
        except SkipRow as skip:
            skip.id, skip.image = file.stem, file.name
            raise
        return Record(
            id=file.stem,
            source=source_name(file),
            kind="pair",
            images=[],
            turns=[{"from": "gpt", "value": caption}],
            meta=meta_beside(meta),
            video=VideoFile(data, file.name),
            changes=changes,
            drawn=drawn_of(meta, 0),
        )


def _beside(file: Path, suffix: str) -> bytes | None:
    """Content of the file of the same name with another suffix; None if there is none.

    Raises:
        SkipRow: the file is too large or cannot be read.
    """
    path = file.with_suffix(suffix)
    try:
        size = path.stat().st_size
        if size > MAX_TEXT:
            raise SkipRow("member_too_large", f"{path.name} has {size} bytes, more than {MAX_TEXT >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SkipRow("image_unreadable", f"{path.name}: {error.strerror}") from error
