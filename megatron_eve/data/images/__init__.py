"""Pictures: bytes to upright RGB, and RGB to the views that a model takes."""

from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, MAX_PIXELS_LIMIT, ImageError, decode_image
from megatron_eve.data.images.patches import cut_patches, padded_square, uncut_patches, view_of
from megatron_eve.data.images.resizing import resize

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "MAX_PIXELS_LIMIT",
    "ImageError",
    "cut_patches",
    "decode_image",
    "padded_square",
    "resize",
    "uncut_patches",
    "view_of",
]
