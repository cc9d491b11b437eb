"""Puts the frames of a video in the place of the video of a record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.frames import VideoFrames
from megatron_eve.models.text_format import IMAGE_TOKEN

VIDEO_TOKEN = "<video>"
"""Marks the position of a video in a text."""


def with_frames(record: Record, taken: VideoFrames) -> Record:
    """Replace the video of a record by its frames.

    The text gets one `<image>` per frame: in a conversation in front of the first question, each followed by a newline,
    as in NVlabs/VILA (`llava/data/dataset.py`); otherwise in front of the text, without separators. Those of a video
    that is to be drawn go to the `<video>` or `<image>` of its first answer that has one.

    Args:
        record: a record with a video and no images.
        taken: frames of its video.

    Returns:
        The new record; its `meta` also has `video_duration` and `video_frame_times`, in seconds.

    Raises:
        SkipRow: no answer says where the video is to be drawn.
    """
    drawn = bool(record.drawn) or record.kind == "generation"
    turns = _with_drawn_frames(record, taken) if drawn else _with_read_frames(record, taken)
    return replace(
        record,
        images=[ImageFile(file) for file in taken.files],
        turns=turns,
        meta={**record.meta, "video_duration": taken.duration, "video_frame_times": taken.times},
        video=None,
        drawn=drawn,
        is_video=True,
    )


def _turns(record: Record) -> list[Any]:
    return list(record.turns) if isinstance(record.turns, list) else []


def _with_drawn_frames(record: Record, taken: VideoFrames) -> list[Any]:
    """The turns with the frames in an answer."""
    turns = _turns(record)
    for place, turn in enumerate(turns):
        text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == "gpt" else None
        for mark in (VIDEO_TOKEN, IMAGE_TOKEN):
            if isinstance(text, str) and mark in text:
                turns[place] = {**turn, "value": text.replace(mark, IMAGE_TOKEN * len(taken.files), 1)}
                return turns
    raise SkipRow("drawn_without_place", f"{len(turns)} turns")


def _with_read_frames(record: Record, taken: VideoFrames) -> Any:
    """The turns with the frames in front of the first text; turns that are none stay as they are."""
    role, mark = ("human", f"{IMAGE_TOKEN}\n") if record.kind == "conversation" else ("gpt", IMAGE_TOKEN)
    turns = _turns(record)
    for place, turn in enumerate(turns):
        if isinstance(turn, dict) and turn.get("from") == role and isinstance(turn.get("value"), str):
            turns[place] = {**turn, "value": mark * len(taken.files) + turn["value"]}
            return turns
    return record.turns
