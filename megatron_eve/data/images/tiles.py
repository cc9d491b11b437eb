"""Pictures in tiles: a view that is cut into tiles is made of views that are not, so that every backend can decode it.

These are the picture at the size of all tiles and, where there are several, the whole picture at the size of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_eve.data.images.resizing import Pixels
from megatron_eve.models.family import View

_WHOLE = " (whole)"


def uncut_views(views: Mapping[str, View]) -> dict[str, View]:
    """The views that views of a picture are made of, by name; those that are not cut into tiles are themselves."""
    found: dict[str, View] = {}
    for name, view in views.items():
        found[name] = view._replace(tile=0)
        if view.tile and view.shape[0] > 1:
            found[name + _WHOLE] = view._replace(width=view.tile, height=view.tile, tile=0)
    return found


def cut_views(pixels: Mapping[str, Any], views: Mapping[str, View]) -> dict[str, Any]:
    """Views of a picture from those that they are made of, all NumPy arrays or all tensors.

    Args:
        pixels: uint8, of the shapes of `uncut_views(views)`, by the same names.
        views: wanted.
    """
    return {
        name: _cut(pixels[name], pixels.get(name + _WHOLE), view) if view.tile else pixels[name]
        for name, view in views.items()
    }


def _cut(picture: Any, whole: Any, view: View) -> Any:
    side, count = view.tile, view.shape[0]
    found = picture.reshape(view.height // side, side, view.width // side, side, 3).swapaxes(1, 2)
    found = found.reshape(-1, side, side, 3)
    if whole is None:
        return np.ascontiguousarray(found) if isinstance(found, np.ndarray) else found.contiguous()
    if isinstance(found, np.ndarray):
        return np.concatenate([found, whole[None]])
    joined = found.new_empty(count, side, side, 3)
    joined[:-1], joined[-1] = found, whole
    return joined


def uncut_picture(tiles: Pixels, view: View) -> Pixels:
    """The picture at the size of all tiles: uint8 of `view.shape` -> uint8 [view.height, view.width, 3]."""
    side = view.tile
    rows, columns = view.height // side, view.width // side
    found = tiles[: rows * columns].reshape(rows, columns, side, side, 3).swapaxes(1, 2)
    return np.ascontiguousarray(found).reshape(view.height, view.width, 3)
