"""The caption of a record: where it stands in the turns of a pair, and how another one takes its place."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.data.schema import Record
from megatron_eve.models.text_format import IMAGE_TOKEN

ORIGINAL_CAPTION = "original_caption"
"""Key of `meta` that keeps the caption that another one has replaced."""


def caption_of(record: Record) -> str | None:
    """The caption of a pair, or the text from which a picture is drawn; None for rows of other kinds.

    It is empty where a pair has no caption, as pictures of SA-1B.
    """
    if record.kind not in ("pair", "generation"):
        return None
    return str(record.turns[0]["value"]).replace(IMAGE_TOKEN, "").strip()


def with_caption(record: Record, caption: str) -> Record:
    """A pair with another caption. The one that it had goes into `meta`, unless it was empty.

    Args:
        record: of kind pair or generation.
        caption: without a placeholder of pictures.
    """
    before = caption_of(record)
    assert before is not None, f"a row of kind {record.kind} has no caption"
    first, *others = record.turns
    places = IMAGE_TOKEN * str(first["value"]).count(IMAGE_TOKEN)
    meta = {**record.meta, ORIGINAL_CAPTION: before} if before else dict(record.meta)
    return replace(record, turns=[{**first, "value": places + caption}, *others], meta=meta)
