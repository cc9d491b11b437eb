"""One interface to decode pictures: what is asked of a backend, and what it answers.

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
    """What is the same for all pictures of a dataset.

    Attributes:
        apply_exif: turn pictures upright as their EXIF orientation says.
        max_pixels: larger pictures are refused, from the header alone.
    """

    apply_exif: bool
    max_pixels: int


@dataclass(frozen=True)
class ImageTask:
    """One picture.

    Attributes:
        data: the file.
        views: what is wanted of it, by name.
    """

    data: bytes
    views: Mapping[str, View]


Views = dict[str, torch.Tensor]
"""What a picture became, by the names of its views: uint8 of each view's shape."""


class ImageDecoder(Protocol):
    """A backend. One thread at a time may use it."""

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """Decode pictures and make of each the views that are wanted.

        Returns:
            For each task, in order, its views or why they cannot be had.
        """

    def close(self) -> None:
        """Let go of threads and memory."""
