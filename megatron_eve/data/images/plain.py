"""Decides from the header of a file whether the fast decoders give the same pixels as Pillow.

Pillow is the reference (`decode_image`). Other decoders may assume another colour space, bit depth or frame for an
unusual file, and differ between CPU and GPU. So the fast decoders get common files only, on which all agree; Pillow
decodes the others.
"""

from __future__ import annotations

from PIL import Image

from megatron_eve.data.images.png import may_be_turned

# (horizontal, vertical) sampling of the luminance where the colours are sampled once: 4:4:4, 4:2:2 and 4:2:0.
_SAMPLINGS = ((1, 1), (2, 1), (2, 2))
_END_OF_JPEG = b"\xff\xd9"


def is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether every decoder gives the same stored pixels for a file.

    Args:
        image: the file as Pillow opened it, not decoded yet.
        data: its bytes.
    """
    if image.format == "JPEG":
        return _plain_jpeg(image, data)
    if image.format == "PNG":
        return _plain_png(image, data)
    if image.format == "WEBP":
        return image.mode in ("RGB", "RGBA") and not getattr(image, "is_animated", False)
    return False


def _plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """True for a JPEG file that is gray or YCbCr without contradictory markers, and that has its end marker.

    CMYK and YCCK are excluded: only Adobe's marker tells whether they are inverted, and not all decoders read it.
    """
    components: list[tuple[int, int, int, int]] = getattr(image, "layer", [])
    if not data.endswith(_END_OF_JPEG):
        return False
    if image.mode == "L":
        return [c[1:3] for c in components] == [(1, 1)]
    if image.mode != "RGB" or image.info.get("adobe_transform", 1) != 1:
        return False
    return (
        [c[0] for c in components] == [1, 2, 3]
        and components[0][1:3] in _SAMPLINGS
        and all(c[1:3] == (1, 1) for c in components[1:])
    )


def _plain_png(image: Image.Image, data: bytes) -> bool:
    """True for a PNG file of 8 bits a channel with one frame, no transparency and no chunk for an orientation."""
    kinds = [tile[3] for tile in getattr(image, "tile", [])]
    return (
        image.mode in ("RGB", "L", "RGBA", "P")
        and kinds == [image.mode]
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and not may_be_turned(data)
    )
