"""The interface of image decoding backends: their input and output.

A pack's pictures are decoded together; what each becomes, and at which size, is known from its plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_eve.data.images.decode import ImageError
from megatron_eve.models.family import View


@dataclass(frozen=True)
class DecodeSettings:
    """Settings for all pictures of a dataset.

    Attributes:
        apply_exif: turn pictures upright as their EXIF orientation says.
        max_pixels: larger pictures are refused, from the header alone.
    """

    apply_exif: bool
    max_pixels: int


@dataclass(frozen=True)
class ImageTask:
    """One picture to decode.

    Attributes:
        data: the file.
        views: the requested views, by name.
    """

    data: bytes
    views: Mapping[str, View]


Views = dict[str, torch.Tensor]
"""The views of a decoded picture, by name: uint8 of each view's shape."""


class ImageDecoder(Protocol):
    """A backend. One thread at a time may use it."""

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """Decode pictures and make the requested views of each.

        Returns:
            For each task, in order, its views, or the error if the picture cannot be used.
        """

    def close(self) -> None:
        """Release threads and memory."""
