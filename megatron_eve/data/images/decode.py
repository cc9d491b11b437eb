"""Decode the bytes of an image file to an RGB picture; each failure has a reason, which is counted.

This is the reference for orientation and colours: the fast decoders and the exported image processors (which have a
copy of the rules) give the same.

What Pillow would do by itself and is not wanted here: try every format it knows (EPS starts Ghostscript),
clip 16-bit gray to white instead of scaling it, decode pictures of any size, and refuse whole ones for a long text
beside their pixels. What is kept as published:
`convert("RGB")` for everything else, which drops an alpha channel rather than blending it.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images.plain import is_plain
from megatron_eve.data.images.png import without_texts

ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM") + (
    ("AVIF",) if features.check("avif") else ()
)

MAX_PIXELS_LIMIT = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""Pillow refuses pictures above this by itself, so a higher cap would have no effect."""

DEFAULT_MAX_PIXELS = 89_478_485
"""A quarter of a gigabyte as RGB: Pillow's own threshold for a warning."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Orientation(NamedTuple):
    """How a stored picture becomes upright: rows and columns are exchanged first, then it is mirrored."""

    transpose: bool
    flip_x: bool
    flip_y: bool


ORIENTATIONS = {
    2: Orientation(transpose=False, flip_x=True, flip_y=False),
    3: Orientation(transpose=False, flip_x=True, flip_y=True),
    4: Orientation(transpose=False, flip_x=False, flip_y=True),
    5: Orientation(transpose=True, flip_x=False, flip_y=False),
    6: Orientation(transpose=True, flip_x=True, flip_y=False),
    7: Orientation(transpose=True, flip_x=True, flip_y=True),
    8: Orientation(transpose=True, flip_x=False, flip_y=True),
}
"""By EXIF orientation; the same as Pillow's transpositions (`_UPRIGHT`), for other decoders."""


@dataclass(frozen=True)
class ImageHeader:
    """The contents of an image file's header.

    Attributes:
        format: Pillow's name of it, one of ACCEPTED_FORMATS.
        plain: every decoder gives the same stored pixels (see `is_plain`); other files are decoded by Pillow.
        orientation: EXIF orientation of a plain file; 1 is upright.
        width, height: as stored, in pixels.
    """

    format: str
    plain: bool
    orientation: int
    width: int
    height: int

    def upright_size(self, apply_exif: bool) -> tuple[int, int]:
        """Width and height in pixels of a plain file as it will be decoded."""
        turn = ORIENTATIONS.get(self.orientation) if apply_exif else None
        return (self.height, self.width) if turn is not None and turn.transpose else (self.width, self.height)


class ImageError(SkipRow):
    """An image file that cannot be used.

    `reason` is "image_empty", "image_format", "image_too_large" (pixels) or "image_damaged" (or truncated).
    """


def decode_image(data: bytes, *, apply_exif: bool, max_pixels: int) -> Image.Image:
    """Decode a whole image file (the first frame of an animated one).

    Args:
        data: the file's bytes.
        apply_exif: turn the picture upright as its EXIF orientation says. The published code does not (but
            TIFF, which Pillow always turns).
        max_pixels: refuse larger pictures, from the header, before a pixel is decoded.

    Returns:
        An RGB picture with its pixels loaded.

    Raises:
        ImageError: empty, not in an accepted format, too large, truncated or corrupt.
    """
    image = _open(data, max_pixels)
    # Pillow's plugins raise nearly anything on damaged input: OSError, SyntaxError, struct.error, IndexError.
    # Whatever it is, the result is that this file cannot be decoded.
    try:
        rgb = _to_rgb(image)  # decodes the whole file
    except Exception as error:
        raise ImageError("image_damaged", f"{image.format} does not decode: {error}") from error
    turn = _UPRIGHT.get(_orientation(image)) if apply_exif else None
    return rgb if turn is None else rgb.transpose(turn)


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Read the header of an image file without decoding a pixel.

    Raises:
        ImageError: empty, not in an accepted format, too large, or the header cannot be read.
    """
    image = _open(data, max_pixels)
    plain = is_plain(image, data)
    # Pillow decodes a PNG to find its orientation; a plain one has none.
    turned = plain and image.format != "PNG"
    return ImageHeader(image.format or "", plain, _orientation(image) if turned else 1, *image.size)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn uint8 [H, W, 3] as an EXIF orientation says; the same as Pillow's transpositions."""
    turn = ORIENTATIONS.get(orientation)
    if turn is None:
        return pixels
    if turn.transpose:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if turn.flip_y else 1, :: -1 if turn.flip_x else 1])


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError("image_empty", "the file has no bytes")
    try:
        image = Image.open(BytesIO(without_texts(data)), formats=ACCEPTED_FORMATS)
    except UnidentifiedImageError:
        raise ImageError(
            "image_format", f"not {', '.join(ACCEPTED_FORMATS)}: begins with {data[:12]!r}"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError("image_too_large", str(error)) from error
    except Exception as error:  # as above: a damaged header raises nearly anything
        raise ImageError("image_damaged", f"the header does not decode: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("image_too_large", f"{width} x {height} pixels, more than the cap of {max_pixels}")
    if width < 1 or height < 1:
        raise ImageError("image_damaged", f"the header says {width} x {height} pixels")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be read. Only once decoded."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block is no reason to lose a picture that decodes
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray_to_rgb(_scale(np.asarray(image), (65535,)))
    if image.mode == "F":
        return _gray_to_rgb(_scale(np.asarray(image), (1, 255, 65535)))
    if image.mode == "RGB":  # of which convert makes a copy, which takes as long as decoding
        image.load()
        return image
    return image.convert("RGB")


def _scale(values: NDArray[np.generic], ranges: tuple[int, ...]) -> NDArray[np.uint8]:
    """Gray values to 0..255: from the first range 0..r that holds them all, else from their own span."""
    gray = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(gray.min()), float(gray.max())
    white = next((float(r) for r in ranges if low >= 0 and high <= r), 0.0)
    if not white:
        gray, white = gray - low, (high - low) or 1.0
    return np.rint(gray * (255.0 / white)).astype(np.uint8)


def _gray_to_rgb(gray: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(gray).convert("RGB")
