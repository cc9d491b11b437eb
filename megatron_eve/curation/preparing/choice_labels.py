"""Letters drawn on a diagram in place of its texts, which the choices of AI2D's questions name.

The diagrams of the download still have their texts; a question with "abcLabel" asks about the picture with letters.
Where they stand is in the annotations: {"text": {"T0": {"rectangle": [[x1, y1], [x2, y2]], "replacementText": "A"}}}.
White rectangle, black letter: as in big_vision 11eea57 (datasets/ai2d/ai2d.py), with the font of Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any, NamedTuple

from PIL import ImageDraw, ImageFont

from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, decode_image

_LARGEST = 100  # pixels of a letter's font
_SMALLEST = 8


class Label(NamedTuple):
    """A letter and the rectangle that it covers, in pixels."""

    letter: str
    left: int
    top: int
    right: int
    bottom: int


def read_labels(annotations: Mapping[str, Any]) -> dict[str, Label]:
    """Letter -> its label, of those that can be drawn: with an area.

    Args:
        annotations: of a picture, as parsed from JSON.
    """
    texts = annotations.get("text")
    labels = {}
    for text in texts.values() if isinstance(texts, dict) else ():
        try:
            (x1, y1), (x2, y2) = text["rectangle"]
            letter = text["replacementText"]
            corners = [round(value) for value in (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))]
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        label = Label(letter, *corners)
        if isinstance(letter, str) and letter and label.left < label.right and label.top < label.bottom:
            labels[letter.upper()] = label
    return labels


def draw_labels(data: bytes, labels: Mapping[str, Label]) -> bytes:
    """A PNG file of a picture with its labels.

    Args:
        data: image file.
        labels: see `read_labels`.

    Raises:
        SkipRow: the file is not a picture, or is damaged.
    """
    picture = decode_image(data, apply_exif=False, max_pixels=DEFAULT_MAX_PIXELS)
    draw = ImageDraw.Draw(picture)
    for label in labels.values():
        draw.rectangle((label.left, label.top, label.right, label.bottom), fill="white")
        font = _font(draw, label)
        centre = ((label.left + label.right) / 2, (label.top + label.bottom) / 2)
        draw.text(centre, label.letter, fill="black", font=font, anchor="mm")
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _font(draw: ImageDraw.ImageDraw, label: Label) -> ImageFont.FreeTypeFont:
    """The largest font with which the letter fits into its rectangle; at least one that can be read."""
    for size in range(min(_LARGEST, label.bottom - label.top), _SMALLEST, -1):
        font = _sized(size)
        left, top, right, bottom = draw.textbbox((0, 0), label.letter, font=font)
        if right - left <= label.right - label.left and bottom - top <= label.bottom - label.top:
            return font
    return _sized(_SMALLEST)


def _sized(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
