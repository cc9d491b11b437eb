"""Texts: JSON lines of `{"text"}`, with pictures in it or without, or of FLAN's `{"inputs", "targets"}`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Kind, Record
from megatron_eve.data.sources.fields import (
    DRAW_KEY,
    close_to_images,
    drawn_of,
    image_names,
    plain_text,
    source_name,
)
from megatron_eve.data.sources.image_files import image_file
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.data.text.turns import is_blank


class TextSource(JsonSource):
    """Rows of text, and documents with image files.

    `{"text": ...}` becomes a record of kind "text". With `"images": [names]` (or `"image"`) beside it, it becomes
    one of kind "interleaved": each `<image>` in the text marks the place of a picture, and one space on either side of
    it goes, as in documents of MMC4; `"draw"` says which of them are to be drawn. `{"inputs": ..., "targets": ...}`
    (github.com/google-research/FLAN) becomes a conversation of one question and its answer. `id` is kept if there is
    one; other keys go into `meta`.

    Args:
        files: JSON lines, or JSON arrays.
        image_root: folder that image names are relative to.

    Raises:
        DataError: while iterating, a file cannot be read further.
    """

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        kind: Kind
        used: tuple[str, ...]
        images: list[ImageFile] = []
        changes: Counter[str] = Counter()
        if "text" in fields and (names := image_names(fields)):
            images = [image_file(name) for name in names]
            used, kind = ("text", "image", "images"), "interleaved"
        elif "text" in fields:
            used, kind = ("text",), "text"
        elif "inputs" in fields and "targets" in fields:
            used, kind = ("inputs", "targets"), "conversation"
        else:
            raise SkipRow("text_field", f"it has {', '.join(map(repr, fields))!s:.200}")
        if images:
            texts = [_document(fields["text"])]
        else:
            texts = [plain_text(fields[key], key, changes) for key in used]
        if is_blank(texts[-1]):
            raise SkipRow("nothing_to_train", f"{used[-1]!r} is blank")
        roles = ("human", "gpt")[-len(texts) :]
        name = fields.get("id")
        return Record(
            id=None if name is None else str(name),
            source=source_name(row.file),
            kind=kind,
            images=images,
            turns=[{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)],
            meta={key: value for key, value in fields.items() if key not in (*used, "id", DRAW_KEY)},
            changes=changes,
            drawn=drawn_of(fields, len(images)),
        )


def _document(text: object) -> str:
    """The text of a document with pictures, without a space beside a picture."""
    if not isinstance(text, str):
        raise SkipRow("value_not_text", f"text is {type(text).__name__}")
    return close_to_images(text)
