"""Small copies of the pictures of rows, for the pages that stages write."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from megatron_eve.curation.work import Work
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.schema import Record

Place = tuple[int, int]
"""Numbers of a shard and of a row in it."""


def records_at(work: Work, places: Iterable[Place]) -> Iterator[tuple[Place, Record | SkipRow]]:
    """The rows at some places, each shard read once, or why one cannot be read."""
    rows_of: dict[int, set[int]] = defaultdict(set)
    for shard, row in places:
        rows_of[shard].add(row)
    for shard in sorted(rows_of):
        for row, record in work.records(shard, np.array(sorted(rows_of[shard]), dtype=np.int64)):
            yield (shard, row), record


def thumbnail(record: Record | SkipRow, side: int) -> Image.Image | str:
    """The first picture of a row, its longer side at most `side` pixels, or the reason why there is none."""
    try:
        if isinstance(record, SkipRow):
            raise record
        if not record.images:
            return "no_picture"
        data = record.images[0].data or b""
        picture = decode_image(data, apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)
    except SkipRow as skip:
        return skip.reason
    picture.thumbnail((side, side))
    return picture


def picture_html(picture: Image.Image, name: str = "") -> str:
    """A picture as HTML with the JPEG file in it; `name` is said in its place where it is not shown."""
    file = BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/jpeg;base64,{data}">'
