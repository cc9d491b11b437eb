"""Turns and images of a row that holds a conversation, in the ways in which data sets write it.

    LLaVA, ShareGPT:       "conversations": [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": ...}]
    OpenAI, Hugging Face:  "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": ...}]
    with parts:            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}]

"human" is also called "user", and "gpt" "assistant"; a first turn may be from "system". Roles may have either pair of
names under either key. A content of parts becomes a text with `<image>` and a newline at each picture's place, as in
the chat template of an exported model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile
from megatron_eve.data.sources.image_files import from_base64, image_file
from megatron_eve.models.text_format import IMAGE_TOKEN

KEYS = ("conversations", "messages")
"""Keys, or columns, of the turns."""

_ROLES = {"user": "human", "assistant": "gpt"}
_PLACE = f"{IMAGE_TOKEN}\n"
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


class Conversation(NamedTuple):
    """What a row says.

    Attributes:
        key: under which it stands.
        turns: list of `{"from", "value"}`; what is no turn is left as it is, see `Record.turns`.
        images: in the order of their `<image>`.
    """

    key: str
    turns: Any
    images: list[ImageFile]


class _ImagePart(NamedTuple):
    """A picture inside a message: its file, or the number of the row's image, or neither (the next one)."""

    file: ImageFile | None
    number: int | None


def read_conversation(fields: Mapping[str, Any], images: Sequence[ImageFile]) -> Conversation:
    """The conversation of a row.

    Images of a row whose messages say no place for any of them go in front of the first question, as in TRL. Under
    "conversations" they do not, since LLaVA's rows always say it: such a row has lost its `<image>`.

    Args:
        fields: of the row.
        images: that its own keys or columns name.

    Raises:
        SkipRow: there are two conversations, a part of a message is neither text nor an image, or the images of the
            parts are not those of the row.
    """
    given = [key for key in KEYS if fields.get(key)] or [key for key in KEYS if fields.get(key) is not None]
    if len(given) > 1 and fields[given[0]]:
        raise SkipRow("two_conversations", f"it has {' and '.join(map(repr, given))}")
    key = given[0] if given else KEYS[0]
    if not isinstance(turns := fields.get(key), list):
        return Conversation(key, turns, list(images))
    parts: list[_ImagePart] = []
    read = [_turn(turn, number, parts) for number, turn in enumerate(turns, start=1)]
    if parts:
        return Conversation(key, read, list(_images_of(parts, images)))
    if images and key == "messages" and not any(IMAGE_TOKEN in _text(turn) for turn in read):
        first = next((turn for turn in read if isinstance(turn, dict) and turn.get("from") == "human"), None)
        if first is not None:
            first["value"] = _PLACE * len(images) + _text(first)
    return Conversation(key, read, list(images))


def _turn(turn: object, number: int, parts: list[_ImagePart]) -> object:
    """A turn as `{"from", "value"}`; image parts are appended to `parts`."""
    if not isinstance(turn, dict):
        return turn
    role, value = (
        turn.get(name) if turn.get(name) is not None else turn.get(other)
        for name, other in (("from", "role"), ("value", "content"))
    )
    if isinstance(role, str):
        role = _ROLES.get(role, role)
    if isinstance(value, list):
        value = "".join(_part(part, number, parts) for part in value)
    return {"from": role, "value": value}


def _part(part: object, number: int, parts: list[_ImagePart]) -> str:
    """The text of one part of a message, `<image>` for a picture. Columns of parquet give empty keys as None."""
    if not isinstance(part, dict):
        raise SkipRow("message_part", f"turn {number} has a part that is {type(part).__name__}")
    keys = ("text", *_IMAGE_KEYS)
    kind = part.get("type") or next((key for key in keys if part.get(key) is not None), None)
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise SkipRow("value_not_text", f"the text of a part of turn {number} is {type(text).__name__}")
        return text
    if kind not in _IMAGE_KEYS:
        raise SkipRow("message_part", f"turn {number} has a part of type {kind!r:.80}")
    index = part.get("index")
    parts.append(_ImagePart(_file(part), index if isinstance(index, int) else None))
    return _PLACE


def _file(part: Mapping[str, Any]) -> ImageFile | None:
    """The file that an image part names; None if it is one of the row's images."""
    key = next((key for key in _IMAGE_KEYS if part.get(key) is not None), None)
    value = None if key is None else part[key]
    if isinstance(value, dict):  # {"url"} of OpenAI, {"bytes", "path"} of the Hugging Face hub
        value = next((value[name] for name in ("url", "bytes", "path") if value.get(name) is not None), value)
    if isinstance(value, bytes):
        return ImageFile(data=value)
    if key is None:
        return None
    if not isinstance(value, str) or not value:
        raise SkipRow("image_field", f"{key!r} of an image part is {value!r:.80}")
    return ImageFile(data=from_base64(value)) if key == "base64" else image_file(value)


def _images_of(parts: Sequence[_ImagePart], images: Sequence[ImageFile]) -> Iterator[ImageFile]:
    """The images of the parts, from the parts themselves or from those of the row, each of which has to be used."""
    files = [part.file for part in parts]
    if images and None not in files and files != list(images):
        raise SkipRow("image_field", "the messages name other files than 'images'")
    used: set[int] = set()
    count = 0
    for part in parts:
        if part.file is not None:
            yield part.file
            continue
        index = count if part.number is None else part.number
        if not 0 <= index < len(images):
            raise SkipRow("image_count", f"images: {len(images)}, image parts: {len(parts)}")
        used.add(index)
        count += 1
        yield images[index]
    if None in files and len(used) < len(images):
        raise SkipRow("image_count", f"images: {len(images)}, image parts: {len(parts)}")


def _text(turn: object) -> str:
    """The text of a turn, empty if it has none."""
    value = turn.get("value") if isinstance(turn, dict) else None
    return value if isinstance(value, str) else ""
