"""Which files the fast decoders read as Pillow does, told from the head of the file.

Pillow's view of a picture is the one that counts (`decode_image`). Another decoder may take another colour space, bit
depth or frame of an unusual file for granted, and differs between a CPU and a GPU in what. So only what is usual, and
thus the same to all, is left to the fast decoders; everything else Pillow decodes.
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
    """Gray or YCbCr, said without contradiction; whole, as far as its end tells.

    CMYK and YCCK are not: whether they are inverted is said by Adobe's marker alone, and not all decoders go by it.
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
    """8 bits a channel, one frame, no transparent colour or palette entry, nothing that may say it is turned."""
    kinds = [tile[3] for tile in getattr(image, "tile", [])]
    return (
        image.mode in ("RGB", "L", "RGBA", "P")
        and kinds == [image.mode]
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
        and not may_be_turned(data)
    )
