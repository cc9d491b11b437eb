"""Decoding with Pillow alone: the reference, and the fallback for files that the faster backends cannot decode."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_eve.data.images.decode import ImageError, decode_image
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Views
from megatron_eve.data.images.patches import view_of


class PillowDecoder:
    """The plain reference: one picture after another, as the published code does."""

    def __init__(self, settings: DecodeSettings) -> None:
        self._settings = settings

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """See `ImageDecoder`."""
        return [prepare_with_pillow(task, self._settings) for task in tasks]

    def close(self) -> None:
        """Does nothing."""


def prepare_with_pillow(task: ImageTask, settings: DecodeSettings) -> Views | ImageError:
    """One picture, bit-equal to the published preprocessing."""
    try:
        image = decode_image(task.data, apply_exif=settings.apply_exif, max_pixels=settings.max_pixels)
    except ImageError as error:
        return error
    return {name: torch.from_numpy(view_of(image, view)) for name, view in task.views.items()}
