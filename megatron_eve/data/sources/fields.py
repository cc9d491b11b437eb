"""What the sources do alike with what other people wrote: JSON objects, and texts that stand beside pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.conversation import IMAGE_TOKEN, MAX_CHARACTERS

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi"})
"""Names of video files end in one of these; what a file holds is told from its bytes (`data/sources/frames.py`)."""

MAX_TEXT = 1 << 24
"""Bytes of a caption or of a JSON beside a picture, at most."""

_BOM = b"\xef\xbb\xbf"
# Said elsewhere in the record, or about the download alone. EXIF stands in the picture itself.
_NOT_META = frozenset({"caption", "key", "status", "error_message", "exif"})


def parse_json(text: bytes, name: str = "") -> Any:
    """What a JSON text holds; NaN and Infinity, which JSON has not and Python writes, become None.

    Args:
        text: UTF-8, with or without a byte order mark. Halves of surrogate pairs are taken: they are refused where they
            matter, in a text that is tokenised.
        name: of what holds the text, for messages.

    Raises:
        SkipRow: it is not JSON, or is nested too deep.
    """
    try:
        return json.loads(text.removeprefix(_BOM).decode("utf-8", "surrogatepass"), parse_constant=_to_none)
    except (ValueError, RecursionError) as error:
        prefix = f"{name}: " if name else ""
        raise SkipRow("broken_json", prefix + " ".join(str(error).split())[:160]) from None


def parse_object(text: bytes, name: str = "") -> dict[str, Any]:
    """The JSON object that a text holds, as `parse_json` reads it.

    Raises:
        SkipRow: it is not JSON, is nested too deep, or is not an object.
    """
    value = parse_json(text, name)
    if not isinstance(value, dict):
        raise SkipRow("not_an_object", f"{name}: " * bool(name) + f"it is {type(value).__name__}")
    return value


def plain_text(value: object, name: str) -> str:
    """A text without pictures: a literal `<image>` in it becomes `<IMAGE>`, as VILA's data sets do.

    Args:
        value: what stands where a text is due.
        name: of that place, for messages.

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
    return value.replace(IMAGE_TOKEN, IMAGE_TOKEN.upper())


def caption_beside(text: bytes | None, name: str, metadata: Mapping[str, Any]) -> str:
    """The caption of a picture or a video: its .txt, else what its .json says, else none.

    Args:
        text: the .txt, if there is one.
        name: of the .txt, for messages.
        metadata: the .json.

    Raises:
        SkipRow: img2dataset or video2dataset could not download the file, or the caption is no valid text.
    """
    if metadata.get("status") not in (None, "success"):
        detail = f"status {metadata['status']!s:.40}: {metadata.get('error_message')!s:.200}"
        raise SkipRow("download_failed", detail)
    if text is not None:
        try:
            return plain_text(text.decode("utf-8-sig"), name)
        except UnicodeDecodeError as error:
            raise SkipRow("text_not_unicode", f"{name}: {error.reason} at byte {error.start}") from None
    given = metadata.get("caption")
    return "" if given is None else plain_text(given, "caption")


def meta_beside(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of the .json beside a picture or a video is kept in `meta`."""
    return {key: value for key, value in metadata.items() if key not in _NOT_META and value is not None}


def source_name(path: str | Path) -> str:
    """What a record calls its file: folder and name, since shards of all data sets are named 00000.tar.

    Bytes of a name that are not UTF-8 are written as escapes.
    """
    return os.fsencode("/".join(Path(path).parts[-2:])).decode("utf-8", "backslashreplace")


def _to_none(_: str) -> None:
    return None
