"""What the sources do alike with what other people wrote: JSON objects, and texts that stand beside pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eve.data.conversation import IMAGE_TOKEN
from megatron_eve.data.errors import SkipRow

_BOM = "\ufeff"


def parse_object(text: bytes, name: str = "") -> dict[str, Any]:
    """The JSON object that a text holds; NaN and Infinity, which JSON has not, become None.

    Args:
        text: UTF-8, with or without a byte order mark. Halves of surrogate pairs are taken: `plain_text` refuses them
            where it matters.
        name: of what holds the text, for messages.

    Raises:
        SkipRow: it is not JSON, is nested too deep, or is not an object.
    """
    about = f"{name}: " if name else ""
    try:
        value = json.loads(
            text.decode("utf-8", "surrogatepass").removeprefix(_BOM), parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise SkipRow("broken_json", about + " ".join(str(error).split())[:160]) from None
    if not isinstance(value, dict):
        raise SkipRow("not_an_object", f"{about}it is {type(value).__name__}")
    return value


def plain_text(value: object, name: str) -> str:
    """A text without pictures: a literal `<image>` in it becomes `<IMAGE>`, as VILA's data sets do.

    Args:
        value: what stands where a text is due.
        name: of that place, for messages.

    Raises:
        SkipRow: it is not a string, or not valid Unicode.
    """
    if not isinstance(value, str):
        raise SkipRow("value_not_text", f"{name} is {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise SkipRow("text_not_unicode", f"half of a surrogate pair in {name}") from None
    return value.replace(IMAGE_TOKEN, IMAGE_TOKEN.upper())


def source_name(path: str | Path) -> str:
    """What a record calls its file: folder and name, since shards of all data sets are named 00000.tar."""
    return "/".join(Path(path).parts[-2:])


def _no_number(_: str) -> None:
    return None
