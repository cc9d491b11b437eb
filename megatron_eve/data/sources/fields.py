"""Parsing shared by the sources: JSON objects, texts, and the captions and metadata of image files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.reasons import LITERAL_IMAGE
from megatron_eve.data.text.turns import MAX_CHARACTERS
from megatron_eve.models.text_format import IMAGE_TOKEN

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi"})
"""Suffixes of video files; the container format is detected from the bytes (`data/sources/frames.py`)."""

MAX_TEXT = 1 << 24
"""Maximum size in bytes of the caption file or JSON file of an image."""

DRAW_KEY = "draw"
"""Key, or column, that says which images of a row are to be drawn."""

# Keys of a caption in the .json of an image; the last two are of text-to-image sets in webdataset shards.
_CAPTIONS = ("caption", "sharegpt4v", "prompt")

_BOM = b"\xef\xbb\xbf"
# Already in other fields of the record, or only about the download. EXIF is in the image file itself.
_NOT_META = frozenset({"caption", "key", "status", "error_message", "exif", DRAW_KEY})


def parse_json(text: bytes, name: str = "") -> Any:
    """Parse a JSON text; NaN and Infinity, which Python writes although JSON lacks them, become None.

    Of equal keys the last one counts.

    Args:
        text: UTF-8, with or without a byte order mark. Unpaired surrogates are accepted here and refused in texts that
            are tokenised.
        name: of the file or field, for messages.

    Raises:
        SkipRow: it is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text.removeprefix(_BOM).decode("utf-8", "surrogatepass"), parse_constant=_to_none)
    except (ValueError, RecursionError) as error:
        prefix = f"{name}: " if name else ""
        raise SkipRow("broken_json", prefix + " ".join(str(error).split())[:160]) from None


def parse_object(text: bytes, name: str = "") -> dict[str, Any]:
    """Parse a JSON text that holds an object; see `parse_json`.

    Raises:
        SkipRow: it is not JSON, is nested too deep, or is not an object.
    """
    value = parse_json(text, name)
    if not isinstance(value, dict):
        raise SkipRow("not_an_object", f"{name}: " * bool(name) + f"it is {type(value).__name__}")
    return value


def plain_text(value: object, name: str, changes: Counter[str]) -> str:
    """Validate a text without images; a literal `<image>` in it becomes `<IMAGE>`, as in published pretraining data.

    Args:
        value: value of a text field.
        name: of the field, for messages.
        changes: counts each `<image>` that is changed (`Record.changes`).

    Raises:
        SkipRow: it is not a string, is too long, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise SkipRow("value_not_text", f"{name} is {type(value).__name__}")
    if len(value) > MAX_CHARACTERS:
        raise SkipRow("text_too_long", f"{name} has {len(value)} characters")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SkipRow("text_not_unicode", f"half of a surrogate pair in {name}") from None
    if found := value.count(IMAGE_TOKEN):
        changes[LITERAL_IMAGE] += found
    return value.replace(IMAGE_TOKEN, IMAGE_TOKEN.upper())


def close_to_images(text: str) -> str:
    """The text of a document without one space on either side of each picture, as published."""
    return text.replace(f"{IMAGE_TOKEN} ", IMAGE_TOKEN).replace(f" {IMAGE_TOKEN}", IMAGE_TOKEN)


def image_names(row: Mapping[str, Any]) -> list[str]:
    """Names of the image files of a row, from `image` or `images`.

    Raises:
        SkipRow: the values are not names, or differ.
    """
    given = {key: row[key] for key in ("image", "images") if row.get(key) not in (None, [])}
    values = [value if isinstance(value, list) else [value] for value in given.values()]
    if len(values) == 2 and values[0] != values[1]:
        raise SkipRow("image_field", "'image' and 'images' name different files")
    names: list[object] = values[0] if values else []
    for name in names:
        if not isinstance(name, str) or not name:
            raise SkipRow("image_field", f"{name!r:.80}")
    return [str(name) for name in names]


def drawn_of(row: Mapping[str, Any], num_images: int) -> bool | tuple[bool, ...]:
    """What the key `draw` of a row says (`Record.drawn`): true, false (as if it were absent), or a list of these.

    Args:
        row: the row's fields.
        num_images: of the row; 0 with a video.

    Raises:
        SkipRow: it says something else, or of another number of images.
    """
    value = row.get(DRAW_KEY)
    if value is None or isinstance(value, bool):
        return bool(value)
    if (
        not isinstance(value, list)
        or not all(isinstance(one, bool) for one in value)
        or len(value) != num_images
    ):
        raise SkipRow("draw_field", f"{value!r:.80}, where the row has {num_images} images")
    return tuple(value) if any(value) else False


def caption_beside(text: bytes | None, name: str, metadata: Mapping[str, Any], changes: Counter[str]) -> str:
    """Caption of an image or a video: from its .txt file, else from its .json file, else empty.

    Args:
        text: content of the .txt file, if there is one.
        name: of the .txt file, for messages.
        metadata: content of the .json file.
        changes: see `plain_text`.

    Raises:
        SkipRow: img2dataset or video2dataset could not download the file, or the caption is not valid text.
    """
    if metadata.get("status") not in (None, "success"):
        detail = f"status {metadata['status']!s:.40}: {metadata.get('error_message')!s:.200}"
        raise SkipRow("download_failed", detail)
    if text is not None:
        try:
            return plain_text(text.decode("utf-8-sig"), name, changes)
        except UnicodeDecodeError as error:
            raise SkipRow("text_not_unicode", f"{name}: {error.reason} at byte {error.start}") from None
    for key in _CAPTIONS:
        if metadata.get(key) is not None:
            return plain_text(metadata[key], key, changes)
    return ""


def meta_beside(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the .json file of an image or a video that are kept in `meta`."""
    return {key: value for key, value in metadata.items() if key not in _NOT_META and value is not None}


def source_name(path: str | Path) -> str:
    """`source` of a record: folder and file name, since shards of many data sets are named 00000.tar.

    Bytes of a name that are not UTF-8 are escaped.
    """
    return os.fsencode("/".join(Path(path).parts[-2:])).decode("utf-8", "backslashreplace")


def _to_none(_: str) -> None:
    return None
