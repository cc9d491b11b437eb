"""How many tiles a picture is cut into, as NVILA does (NVlabs/VILA main, `dynamic_preprocess`). No torch.

It is resized to a grid of tiles whose aspect ratio is nearest to its own, and the tiles are cut out row by row. The
whole picture as one tile is behind them, unless there is only one.
"""

from __future__ import annotations

from functools import cache

MOST_TILES = 12
"""Of a grid. Up to it, a picture that has the size of its grid has the same grid again, so it can be stored so."""


def tile_grid(width: int, height: int, side: int, max_tiles: int) -> tuple[int, int]:
    """Columns and rows of the tiles of a picture.

    Of several grids whose aspect ratio is equally near, the larger one is taken if the picture has more than half of
    its pixels.

    Args:
        width, height: of the picture, in pixels.
        side: of a tile, in pixels.
        max_tiles: of a grid.
    """
    best, smallest = (1, 1), float("inf")
    for columns, rows in _grids(max_tiles):
        difference = abs(width / height - columns / rows)  # floating point, as published
        enough = 2 * width * height > side**2 * columns * rows
        if difference < smallest or (difference == smallest and enough):
            best, smallest = (columns, rows), difference
    return best


@cache
def _grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of all grids, small ones first; those of as many tiles are never equally near."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
