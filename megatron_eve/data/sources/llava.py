"""Conversations in the layout of LLaVA (github.com/haotian-liu/LLaVA): `{"id", "image", "conversations"}` a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.fields import source_name
from megatron_eve.data.sources.json_rows import JsonRows
from megatron_eve.data.sources.source import RawRow

_MEDIA_KEYS = frozenset({"video", "videos", "audio", "audios"})
# Keys under which other data sets name a picture; a row with one of them would be kept as text without it.
_OTHER_IMAGE_KEYS = frozenset(
    f"{word}{ending}"
    for word in ("image", "img", "picture", "photo")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_name", "_url", "_urls")
) - {"image", "images"}


class LlavaSource(JsonRows):
    """Conversations, each with the pictures that `image` (or `images`) names. All else in a row goes into `meta`.

    Args:
        files: JSON arrays, or JSON lines.
        image_root: the folder that names of pictures are relative to.

    Raises:
        DataError: while iterating, a file cannot be read on.
    """

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        name = fields.get("id")
        used = ("id", "image", "images", "conversations")
        return Record(
            id=None if name is None else str(name),
            source=source_name(row.file),
            kind="conversation",
            images=[ImageFile(path=name) for name in _image_names(fields)],
            turns=fields.get("conversations"),
            meta={key: value for key, value in fields.items() if key not in used},
        )


def _image_names(row: Mapping[str, Any]) -> list[str]:
    """The image files of a row, from `image` or `images`.

    Raises:
        SkipRow: they are no names, stand under another key, or the row has a video or sound in their place.
    """
    given = {key: row[key] for key in ("image", "images") if row.get(key) not in (None, [])}
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    if len(values) == 2 and values[0] != values[1]:
        raise SkipRow("image_field", "'image' and 'images' name different files")
    names: list[object] = values[0] if values else []
    for name in names:
        if not isinstance(name, str) or not name:
            raise SkipRow("image_field", f"{name!r:.80}")
    if not names:
        for key, value in row.items():
            if not isinstance(value, (str, list, dict)) or not value:
                continue  # a table with gaps: the row has none
            if key.lower() in _MEDIA_KEYS:
                raise SkipRow("other_media", f"it has {key!r} and no image")
            if key.lower() in _OTHER_IMAGE_KEYS:
                raise SkipRow("image_field", f"it has {key!r} where 'image' is due")
    return [str(name) for name in names]
