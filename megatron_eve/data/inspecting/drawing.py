"""Draw a row of a dataset: its pictures, then its text with a background for each token.

Pillow draws it: megatron_eve needs it anyway, while matplotlib is needed by the quickstart alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from megatron_eve.data.inspecting.layout import RowLayout

Font = ImageFont.FreeTypeFont

WIDTH = 1000
"""Of a drawn row, in pixels."""
MOST_LINES = 250
MOST_PICTURES = 12
TRAINS_COLOUR = (190, 232, 190)
OTHER_COLOUR = (236, 236, 236)
PLACEHOLDER_COLOUR = (255, 214, 150)
ROLE_COLOURS = {"system": (120, 120, 120), "user": (0, 70, 160), "assistant": (0, 95, 30)}

_NO_CHARACTER = "\U0010ffff"  # never assigned: drawn as the font's box for what it lacks
_MARGIN = 16
_LONGEST_WORD = 64  # pieces; longer ones are parted
_INDENT = 96  # of the text, beside the roles
_LINE = 24
_INK = (20, 20, 20)


@dataclass(frozen=True)
class Box:
    """A stretch of text on one line.

    Attributes:
        line: from 0.
        x: left edge in pixels.
        width: in pixels.
        text: what is drawn.
        piece: number of its piece in the row.
    """

    line: int
    x: int
    width: int
    text: str
    piece: int


def wrap(row: RowLayout, font: Font) -> tuple[list[Box], dict[int, str]]:
    """Place a row's pieces on lines. A newline is drawn as \\n and ends its line; a change of role begins one.

    Returns:
        The boxes, and the role that is written beside each line with which a role begins.
    """
    boxes: list[Box] = []
    roles: dict[int, str] = {}
    line, x, role = -1, _INDENT, None
    for number, piece in enumerate(row.pieces):
        if piece.role != role:
            line, x, role = line + 1, _INDENT, piece.role
            roles[line] = piece.role
        elif x > _INDENT and _begins_a_word(row, number):
            word = sum(font.getlength(shown(text, font)) + 1 for text in _word(row, number))
            if x + word > WIDTH - _MARGIN and word <= WIDTH - _MARGIN - _INDENT:
                line, x = line + 1, _INDENT
        for part in shown(piece.text, font).splitlines(keepends=True):
            text = part.replace("\n", "\\n")
            while text:
                fits = _fitting(text, WIDTH - _MARGIN - x, font)
                fits_a_line = font.getlength(text) <= WIDTH - _MARGIN - _INDENT
                if x > _INDENT and (not fits or (fits < len(text) and fits_a_line)):
                    line, x = line + 1, _INDENT
                    continue
                taken, text = text[: max(fits, 1)], text[max(fits, 1) :]
                width = round(font.getlength(taken))
                boxes.append(Box(line, x, width, taken, number))
                x += width + 1
            if part.endswith("\n"):
                line, x = line + 1, _INDENT
    return boxes, roles


def _begins_a_word(row: RowLayout, number: int) -> bool:
    piece, before = row.pieces[number], row.pieces[number - 1]
    return piece.text[:1].isspace() or before.text[-1:].isspace() or before.image is not None


def _word(row: RowLayout, number: int) -> Iterator[str]:
    """Texts of the pieces of the word that begins with a piece; a line break should not split it."""
    yield row.pieces[number].text
    for after in range(number + 1, min(number + _LONGEST_WORD, len(row.pieces))):
        if _begins_a_word(row, after) or row.pieces[after].image is not None:
            return
        yield row.pieces[after].text


def _fitting(text: str, width: float, font: Font) -> int:
    """How many characters of a text fit."""
    if font.getlength(text) <= width:
        return len(text)
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def draw_row(row: RowLayout, pictures: list[Image.Image | str]) -> Image.Image:
    """Draw one row.

    Args:
        row: the row to draw.
        pictures: its first images, in order, each decoded or a text with the error; at most `MOST_PICTURES` are drawn.

    Returns:
        RGB, `WIDTH` pixels wide; the height depends on the content. Text after `MOST_LINES` lines is cut, with a note.
    """
    font, small, title = load_font(16), load_font(13), load_font(20)
    tiles = [_tile(picture, len(row.images)) for picture in pictures[:MOST_PICTURES]]
    places, bottom = _place_tiles(tiles, 2 * _MARGIN + 52)
    boxes, roles = wrap(row, font)
    lines = min(max((box.line for box in boxes), default=0) + 1, MOST_LINES)
    drawn = [box for box in boxes if box.line < MOST_LINES]
    notes = []
    if len(row.images) > len(tiles):
        notes.append(f"{len(row.images) - len(tiles)} more pictures are not shown")
    if len(drawn) < len(boxes):
        left = len(row.pieces) - drawn[-1].piece - 1
        notes.append(f"cut here: {left} more pieces of text are not shown")
    page = Image.new("RGB", (WIDTH, bottom + _LINE * (lines + len(notes)) + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), shown(row.name, title), _INK, title)
    draw.text((_MARGIN, _MARGIN + 28), shown(_facts(row), small), (90, 90, 90), small)
    _draw_legend(draw, small)
    for number, (tile, (x, y)) in enumerate(zip(tiles, places, strict=True)):
        page.paste(tile, (x, y))
        caption = f"image {number + 1}: {row.image_tokens[number]} tokens"
        caption += ", to draw" if number < len(row.drawn) and row.drawn[number] else ""
        draw.text((x, y + tile.height + 2), caption, (90, 90, 90), small)
    for line, role in roles.items():
        if line < MOST_LINES:
            draw.text((_MARGIN, bottom + _LINE * line), role, ROLE_COLOURS[role], small)
    for box in drawn:
        piece = row.pieces[box.piece]
        y = bottom + _LINE * box.line
        ground = PLACEHOLDER_COLOUR if piece.image is not None else OTHER_COLOUR
        ground = TRAINS_COLOUR if piece.trains else ground
        draw.rectangle((box.x, y - 1, box.x + max(box.width, 2) - 1, y + _LINE - 4), ground)
        draw.text((box.x, y), box.text, _INK, font)
    for number, note in enumerate(notes):
        draw.text((_INDENT, bottom + _LINE * (lines + number)), note, (170, 0, 0), font)
    return page


def _facts(row: RowLayout) -> str:
    return (
        f"{row.text_length:,} tokens of text, {row.length:,} once images are expanded, {row.labels:,} labels that "
        f"train; {len(row.images)} image{'' if len(row.images) == 1 else 's'}"
        + (f", {sum(row.drawn)} of them to draw" if any(row.drawn) else "")
    )


def _draw_legend(draw: ImageDraw.ImageDraw, font: Font) -> None:
    x = WIDTH - _MARGIN
    for text, colour in (
        ("image", PLACEHOLDER_COLOUR),
        ("does not train", OTHER_COLOUR),
        ("trains", TRAINS_COLOUR),
    ):
        width = round(font.getlength(text)) + 12
        x -= width
        draw.rectangle((x, _MARGIN, x + width - 1, _MARGIN + 20), colour)
        draw.text((x + 6, _MARGIN + 2), text, _INK, font)
        x -= 6


def _tile(picture: Image.Image | str, count: int) -> Image.Image:
    """A picture reduced to fit the page, or a grey one with the error."""
    side = 440 if count == 1 else 300 if count <= 3 else 180
    if isinstance(picture, str):
        font = load_font(13)
        tile = Image.new("RGB", (side, side // 2), (200, 200, 200))
        text, y = shown(picture, font), 8
        while text and y < tile.height - 20:
            fits = max(_fitting(text, side - 16, font), 1)
            ImageDraw.Draw(tile).text((8, y), text[:fits], (120, 0, 0), font)
            text, y = text[fits:], y + 18
        return tile
    tile = picture.copy()
    tile.thumbnail((side, side))
    return tile


def _place_tiles(tiles: list[Image.Image], top: int) -> tuple[list[tuple[int, int]], int]:
    """Upper left corners of pictures laid out in rows, and the lower end of the last row."""
    places, x, y, height = [], _MARGIN, top, 0
    for tile in tiles:
        width = max(tile.width, 150)  # its caption has to have room
        if x > _MARGIN and x + width > WIDTH - _MARGIN:
            x, y, height = _MARGIN, y + height + 34, 0
        places.append((x, y))
        x, height = x + width + 12, max(height, tile.height)
    return places, y + height + 34 if tiles else y


@lru_cache
def load_font(size: int) -> Font:
    """DejaVu Sans where the system has it, else the one that Pillow brings, which has ASCII and little more.

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
    """Whether a font has a character. Pillow does not say; a missing one looks like one that cannot be there."""
    if character.isspace() or character.isascii():
        return True
    drawn, missing = font.getmask(character), font.getmask(_NO_CHARACTER)
    return drawn.size != missing.size or bytes(drawn) != bytes(missing)
