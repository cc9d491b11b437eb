"""What the sources do alike with what other people wrote: JSON objects, and texts that stand beside pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_eve.data.conversation import IMAGE_TOKEN, MAX_CHARACTERS
from megatron_eve.data.errors import SkipRow

_BOM = b"\xef\xbb\xbf"


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
        return json.loads(text.removeprefix(_BOM).decode("utf-8", "surrogatepass"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        about = f"{name}: " if name else ""
        raise SkipRow("broken_json", about + " ".join(str(error).split())[:160]) from None


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


def source_name(path: str | Path) -> str:
    """What a record calls its file: folder and name, since shards of all data sets are named 00000.tar.

    Bytes of a name that are not UTF-8 are written as escapes.
    """
    return os.fsencode("/".join(Path(path).parts[-2:])).decode("utf-8", "backslashreplace")


def _no_number(_: str) -> None:
    return None
