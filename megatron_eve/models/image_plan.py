"""What a family makes of a picture, from its width and height alone: rows of the sequence, views, codes. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple


class View(NamedTuple):
    """One thing that is decoded of a picture, as uint8; its shape is known before decoding.

    A picture is resized by its `fit`, laid on a square canvas (if `square`), and cut into patches (if `patch_size`) or
    into tiles (if `tile`).

    Attributes:
        width, height: pixels that the picture is resized to.
        pad_colour: red, green and blue (0 to 255) of the canvas, and of what replaces a picture that does not decode.
        square: side in pixels of the canvas in whose middle the picture lies; 0: none.
        margin_unit: the margins left of it and above it are whole multiples of this, in pixels.
        patch_size: side of the patches that it is cut into, in pixels; 0: not cut.
        merge: patches come in groups of merge x merge, row by row; so do those of a group.
        fit: stretch: the aspect ratio is lost; pad: first laid in the middle of a square of its longer side, of
            `pad_colour`; crop: the shorter side resized, the middle of the longer one kept. The last two give squares.
        tile: side of the square tiles that it is cut into, row by row, in pixels; where there are several, the whole
            picture as one tile is behind them. 0: not cut. Its `fit` is stretch, without `square` and `patch_size`.
        pass_order: what is resized first, which decides the rounding: rows, or as Pillow 13 does.
    """

    width: int
    height: int
    pad_colour: tuple[int, int, int]
    square: int = 0
    margin_unit: int = 1
    patch_size: int = 0
    merge: int = 1
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    tile: int = 0
    pass_order: Literal["rows", "pillow13"] = "rows"

    @property
    def is_cut(self) -> bool:
        """Does the first dimension of its shape count parts of a picture? These of all pictures are joined in it."""
        return bool(self.patch_size or self.tile)

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width, 3), (square, square, 3) or, where it is cut, (patches, 3 * patch_size ** 2) or
        (tiles, tile, tile, 3)."""
        if self.tile:
            tiles = self.height * self.width // self.tile**2
            return tiles + (tiles > 1), self.tile, self.tile, 3
        height, width = (self.square, self.square) if self.square else (self.height, self.width)
        if not self.patch_size:
            return height, width, 3
        return height * width // self.patch_size**2, 3 * self.patch_size**2


class ImagePlan(NamedTuple):
    """What one picture becomes, from its width and height alone. Plans are shared: nobody changes one.

    Attributes:
        rows: positions in the sequence.
        grid: rows and columns of its features, or of those of a tile.
        views: what is decoded of it, by name; the first is what image storage "jpeg" stores.
        tiles: parts with a placeholder each in a text, all of as many rows; texts may stand between them. A shared view
            is then cut into as many tiles.
        is_tiled: pictures are cut into tiles, all of them or none, and texts have a newline behind each placeholder,
            also of a picture that is one tile.
    """

    rows: int
    grid: tuple[int, int]
    views: Mapping[str, View]
    tiles: int = 1
    is_tiled: bool = False

    @property
    def tile_rows(self) -> list[int]:
        """Rows of each tile."""
        return [self.rows // self.tiles] * self.tiles


ImagePlanner = Callable[[int, int], ImagePlan]
"""The plan of an upright picture of (width, height) pixels; raises ValueError for a size below 1."""


class ViewUse(NamedTuple):
    """Which ranks decode a view of the pictures of a pack.

    Attributes:
        stage: first or last pipeline stage.
        shared: each of the ranks that share a pack decodes its share of the pictures. Otherwise the first of these
            ranks decodes all and sends them to the others.
    """

    stage: Literal["first", "last"]
    shared: bool


class CodeSizes(NamedTuple):
    """Sizes of the codes that a model reads.

    Attributes:
        grid: positions of an image, (h, w), which are its rows of the sequence.
        depth: codes of a position, D.
        codebook_size: codes lie in 0 .. codebook_size - 1.
    """

    grid: tuple[int, int]
    depth: int
    codebook_size: int
