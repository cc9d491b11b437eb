"""Conversations in the layout of LLaVA (github.com/haotian-liu/LLaVA): `{"id", "image", "conversations"}` a row.

`{"images", "messages"}` of OpenAI, TRL and others says the same (`conversation_rows`). The key "video" in place of
"image" names a video, as in LLaVA-Video and Video-ChatGPT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import Record, VideoFile
from megatron_eve.data.sources.conversation_rows import read_conversation
from megatron_eve.data.sources.fields import DRAW_KEY, drawn_of, image_names, source_name
from megatron_eve.data.sources.image_files import image_file
from megatron_eve.data.sources.json_source import JsonSource
from megatron_eve.data.sources.source import RawRow
from megatron_eve.models.text_format import IMAGE_TOKEN

_VIDEO_KEYS = frozenset({"video", "videos"})
_SOUND_KEYS = frozenset({"audio", "audios"})
# Keys under which other data sets name an image. Without this check, such a row would be kept as text alone.
_OTHER_IMAGE_KEYS = frozenset(
    f"{word}{ending}"
    for word in ("image", "img", "picture", "photo")
    for ending in ("", "s", "_path", "_paths", "_file", "_files", "_name", "_url", "_urls")
) - {"image", "images"}


class LlavaSource(JsonSource):
    """Conversations, each with the images of `image`, `images` or its messages, or the video of `video` (or `videos`).

    All other keys of a row go into `meta`, and so does the name of the video. The video of a row that has images is
    not used. In a row with a video, `<video>` and `<image>` are removed from the questions, each with an adjacent
    newline, and the frames go in front of the first question, as published: some data sets write `<video>`, some
    `<image>`, some neither.

    `"draw"` says which images are to be drawn: true for all of the row, or a list of true and false with one for each;
    their `<image>` stand in answers. With a video it is true or absent, and the answer has `<video>`.

    Args:
        files: JSON arrays, or JSON lines.
        image_root: folder that image names are relative to.

    Raises:
        DataError: while iterating, a file cannot be read further.
    """

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        name = fields.get("id")
        said = read_conversation(fields, [image_file(image) for image in image_names(fields)])
        if not said.images:
            _check_other_keys(fields)
        video = None if said.images else _video_name(fields)
        used = ("id", "image", "images", said.key, DRAW_KEY)
        return Record(
            id=None if name is None else str(name),
            source=source_name(row.file),
            kind="conversation",
            images=said.images,
            turns=said.turns if video is None else _without_placeholders(said.turns),
            meta={key: value for key, value in fields.items() if key not in used},
            video=None if video is None else VideoFile(None, video),
            drawn=drawn_of(fields, len(said.images)),
        )


def _check_other_keys(row: Mapping[str, Any]) -> None:
    """Refuse a row without images that has them under another key, or audio instead; raises SkipRow."""
    for key, value in row.items():
        if not isinstance(value, (str, list, dict)) or not value:
            continue  # an empty value, as in a table with gaps
        if key.lower() in _SOUND_KEYS:
            raise SkipRow("other_media", f"it has {key!r} and no image")
        if key.lower() in _OTHER_IMAGE_KEYS:
            raise SkipRow("image_field", f"it has {key!r} instead of 'image'")


def _video_name(row: Mapping[str, Any]) -> str | None:
    """Name of the video file of a row; None if it has none.

    Raises:
        SkipRow: the value is not a name, or there are several.
    """
    given = [
        value
        for key, value in row.items()
        if key.lower() in _VIDEO_KEYS and value and isinstance(value, (str, list, dict))
    ]
    names = [name for value in given for name in (value if isinstance(value, list) else [value])]
    if not all(isinstance(name, str) and name for name in names):
        raise SkipRow("video_field", f"{given!r:.80}")
    if len(set(names)) > 1:
        raise SkipRow("video_field", f"{len(set(names))} videos")
    return str(names[0]) if names else None


def _without_placeholders(turns: object) -> object:
    """Remove `<video>` and `<image>` from the questions; items that are not turns stay as they are."""
    if not isinstance(turns, list):
        return turns
    cleaned = []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") == "human" and isinstance(turn.get("value"), str):
            text = turn["value"]
            for token in (IMAGE_TOKEN, "<video>"):
                text = text.replace(f"{token}\n", "").replace(f"\n{token}", "").replace(token, "")
            turn = {**turn, "value": text}
        cleaned.append(turn)
    return cleaned
