"""The font of drawn rows, and which characters it has."""

from __future__ import annotations

from functools import lru_cache

from PIL import ImageFont

Font = ImageFont.FreeTypeFont

_NO_CHARACTER = "\U0010ffff"  # not a character: drawn as the font's box for missing characters


@lru_cache
def load_font(size: int) -> Font:
    """DejaVu Sans if the system has it, else Pillow's own font, which has little more than ASCII.

    Args:
        size: in pixels.
    """
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        font = ImageFont.load_default(size)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise RuntimeError("this Pillow was built without FreeType") from None
        return font


def shown(text: str, font: Font) -> str:
    """A text with the characters that a font lacks as escapes such as \\u4e16."""
    return "".join(
        one if one == "\n" or _has(font, one) else one.encode("unicode_escape").decode() for one in text
    )


@lru_cache(maxsize=1 << 16)
def _has(font: Font, character: str) -> bool:
    """Whether a font has a character, by comparing its drawing with that of a missing one: Pillow cannot tell."""
    if character.isspace() or character.isascii():
        return True
    drawn, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
