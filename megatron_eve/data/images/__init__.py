"""Pictures: bytes to upright RGB, and RGB to the 14 x 14 patches that the model takes."""

from megatron_eve.data.images.constants import CLIP_MEAN, CLIP_STD, PAD_COLOUR
from megatron_eve.data.images.decode import DEFAULT_MAX_PIXELS, MAX_PIXELS_LIMIT, ImageError, decode_image
from megatron_eve.data.images.patches import (
    cut_patches,
    image_patches,
    padded_square,
    resize,
    teacher_square,
    uncut_patches,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "DEFAULT_MAX_PIXELS",
    "MAX_PIXELS_LIMIT",
    "PAD_COLOUR",
    "ImageError",
    "cut_patches",
    "decode_image",
    "image_patches",
    "padded_square",
    "resize",
    "teacher_square",
    "uncut_patches",
]
