"""Views of photos: crops of the pictures that scikit-image brings along, mirrored and brighter or darker."""

from __future__ import annotations

import io
import itertools
from functools import cache

import numpy as np
import photos
from PIL import Image, ImageEnhance

from megatron_eve.curation.hashes import perceptual_hash

LEFT_OUT = ("chessboard_RGB", "microaneurysms", "motorcycle_right", "page", "text")
"""Pictures that are too small, or show what another shows."""
KINDS = tuple(name for name in photos.load_captions() if name not in LEFT_OUT)
"""The 20 photos, by name."""
SIDE = 240
"""Pixels of a view's shorter side."""
LEAST_DISTANCE = 12
"""Bits by which the perceptual hashes of two views of `distinct_views` differ at least."""
_LONG_SIDE = 512


@cache
def _photo(kind: str) -> Image.Image:
    with Image.open(photos.find(kind)) as opened:
        photo = opened.convert("RGBA")
    photo.thumbnail((_LONG_SIDE, _LONG_SIDE))
    picture = Image.new("RGBA", photo.size, "white")
    picture.alpha_composite(photo)
    return picture.convert("RGB")


def view(kind: str, number: int, side: int = SIDE) -> Image.Image:
    """A view of a photo: 55 to 85 % of its width and height, any place; the same number gives the same view.

    Args:
        kind: the photo.
        number: of the view.
        side: pixels of the shorter side.
    """
    random = np.random.default_rng([KINDS.index(kind), number])
    photo = _photo(kind)
    width, height = (int(length * random.uniform(0.55, 0.85)) for length in photo.size)
    left, top = int(random.integers(photo.width - width + 1)), int(random.integers(photo.height - height + 1))
    found = photo.crop((left, top, left + width, top + height))
    if random.random() < 0.5:
        found = found.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = ImageEnhance.Brightness(found).enhance(random.uniform(0.8, 1.2))
    scale = side / min(found.size)
    return found.resize((round(found.width * scale), round(found.height * scale)), Image.Resampling.LANCZOS)


@cache
def distinct_views(kind: str, count: int) -> tuple[Image.Image, ...]:
    """The first so many views of a photo that curation does not take for copies of each other."""
    found: list[Image.Image] = []
    hashes: list[int] = []
    for number in itertools.count():
        picture = view(kind, number)
        seen = perceptual_hash(picture)
        if all((seen ^ other).bit_count() >= LEAST_DISTANCE for other in hashes):
            found.append(picture)
            hashes.append(seen)
        if len(found) == count:
            return tuple(found)
    raise AssertionError("itertools.count ends")


def jpeg(picture: Image.Image, quality: int = 92) -> bytes:
    """The bytes of a JPEG file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
