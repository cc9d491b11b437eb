"""Decoding with Pillow alone: the plain reference, which also takes what the faster backends cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_eve.data.images.decode import ImageError, decode_image
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Prepared
from megatron_eve.data.images.patches import image_patches, teacher_square


class PillowDecoder:
    """The plain reference: one picture after another, as the published code does."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Prepared | ImageError]:
        """See `ImageDecoder`."""
        return [prepare_with_pillow(task, self._settings) for task in tasks]

    def close(self) -> None:
        """Nothing to let go of."""


def prepare_with_pillow(task: ImageTask, settings: DecodeSettings) -> Prepared | ImageError:
    """One picture, bit-equal to the published preprocessing."""
    try:
        image = decode_image(task.data, apply_exif=settings.apply_exif, max_pixels=settings.max_pixels)
    except ImageError as error:
        return error
    patches = image_patches(image, task.geometry) if task.patches else None
    square = None
    if task.teacher:
        square = teacher_square(image, task.geometry, settings.teacher_size, settings.teacher_patch_size)
    return Prepared(
        None if patches is None else torch.from_numpy(patches),
        None if square is None else torch.from_numpy(square),
    )
