"""Pictures of clusters to look at: for each, those nearest to the centre, and the farthest that were selected."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from megatron_eve.curation.clusters import evenly_spaced
from megatron_eve.curation.thumbnails import Place, records_at, thumbnail
from megatron_eve.curation.work import Work
from megatron_eve.data.inspecting.drawing import WIDTH, load_font

SHOWN_CLUSTERS = 20
_COLUMNS = 8  # pictures of a line; the first line has the nearest, the second the farthest
_GAP = 8
_SIDE = (WIDTH - _GAP) // _COLUMNS - _GAP
_TITLE, _CAPTION = 30, 18  # heights in pixels
_INK, _GREY = (20, 20, 20), (90, 90, 90)


@dataclass(frozen=True)
class ClusterSheet:
    """One cluster of the page.

    Attributes:
        centre: its number.
        size: pictures that are nearest to it.
        chosen: those that were selected, an array of `clusters.CHOSEN` by distance.
    """

    centre: int
    size: int
    chosen: NDArray[np.void]

    @property
    def shown(self) -> NDArray[np.void]:
        """The rows whose pictures are drawn, at most two lines."""
        if len(self.chosen) <= 2 * _COLUMNS:
            return self.chosen
        return np.concatenate([self.chosen[:_COLUMNS], self.chosen[-_COLUMNS:]])

    @property
    def title(self) -> str:
        """What is written above the pictures."""
        low, high = self.chosen["distance"][[0, -1]].tolist()
        return (
            f"cluster {self.centre}: {self.size:,} pictures, {len(self.chosen):,} selected, distance {low:.3f} to "
            f"{high:.3f}"
        )


def choose_clusters(sizes: NDArray[np.int64], chosen: NDArray[np.void]) -> list[ClusterSheet]:
    """Clusters from the largest to the smallest, at even steps through their order by size; empty ones are left out.

    Args:
        sizes: int64 [K], pictures of each cluster.
        chosen: the selected rows by centre and distance.
    """
    by_size = np.argsort(-sizes, kind="stable")
    shown = evenly_spaced(by_size[: np.count_nonzero(sizes)], SHOWN_CLUSTERS)
    starts, stops = (np.searchsorted(chosen["centre"], shown, side) for side in ("left", "right"))
    return [
        ClusterSheet(int(centre), int(sizes[centre]), chosen[start:stop])
        for centre, start, stop in zip(shown, starts, stops, strict=True)
    ]


def read_thumbnails(work: Work, sheets: list[ClusterSheet]) -> dict[Place, Image.Image | str]:
    """The pictures of sheets by shard and row, each made small, or the error where one cannot be read."""
    places = {(int(one["shard"]), int(one["row"])) for sheet in sheets for one in sheet.shown}
    return {place: thumbnail(record, _SIDE) for place, record in records_at(work, places)}


def draw_sheet(sheet: ClusterSheet, pictures: dict[Place, Image.Image | str]) -> bytes:
    """A sheet as a PNG file, `drawing.WIDTH` pixels wide: a title, and pictures with their distances."""
    lines = -(-len(sheet.shown) // _COLUMNS)
    page = Image.new("RGB", (WIDTH, _TITLE + lines * (_SIDE + _CAPTION + _GAP)), "white")
    draw, font, small = ImageDraw.Draw(page), load_font(16), load_font(12)
    draw.text((_GAP, 6), sheet.title, _INK, font)
    for number, one in enumerate(sheet.shown):
        line, column = divmod(number, _COLUMNS)
        x, y = _GAP + column * (_SIDE + _GAP), _TITLE + line * (_SIDE + _CAPTION + _GAP)
        picture = pictures.get((int(one["shard"]), int(one["row"])), "the row cannot be read")
        if isinstance(picture, str):
            draw.rectangle((x, y, x + _SIDE, y + _SIDE), (220, 220, 220))
            draw.text((x + 4, y + 4), picture[:16], (120, 0, 0), small)
        else:
            page.paste(picture, (x + (_SIDE - picture.width) // 2, y + (_SIDE - picture.height) // 2))
        draw.text((x, y + _SIDE + 1), f"{one['distance']:.3f}", _GREY, small)
    stream = BytesIO()
    page.save(stream, "PNG", optimize=True)
    return stream.getvalue()
