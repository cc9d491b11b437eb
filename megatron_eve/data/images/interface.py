"""One interface to decode pictures: what is asked of a backend, and what it answers.

A pack's pictures are handed over together; what is wanted of each (the model's patches, the teacher's square) and at
which size is known from its geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_eve.data.geometry import PATCH_SIZE, ImageGeometry, teacher_pixels
from megatron_eve.data.images.decode import ImageError


@dataclass(frozen=True)
class DecodeSettings:
    """What is the same for all pictures of a dataset and a rank.

    Attributes:
        apply_exif: turn pictures upright as their EXIF orientation says.
        max_pixels: larger pictures are refused, from the header alone.
        teacher_size: of the model, in pixels of 14-pixel patches.
        teacher_patch_size: side of the teacher's own patches in pixels; 14 where no teacher is.
    """

    apply_exif: bool
    max_pixels: int
    teacher_size: int
    teacher_patch_size: int = PATCH_SIZE

    @property
    def teacher_side(self) -> int:
        """Side of the teacher's square in pixels."""
        return teacher_pixels(self.teacher_size, self.teacher_patch_size)


@dataclass(frozen=True)
class ImageTask:
    """One picture.

    Attributes:
        data: the file.
        geometry: what its recorded size gives.
        patches: the model's patches are wanted.
        teacher: the teacher's square is wanted.
    """

    data: bytes
    geometry: ImageGeometry
    patches: bool
    teacher: bool


class Prepared(NamedTuple):
    """What was asked for, as uint8 tensors."""

    patches: torch.Tensor | None
    """[geometry.patches, 588], see `cut_patches`."""
    square: torch.Tensor | None
    """[S, S, 3], see `teacher_square`."""


class ImageDecoder(Protocol):
    """A backend. One thread at a time may use it."""

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Prepared | ImageError]:
        """Decode pictures, resize each to what is wanted, cut patches.

        Returns:
            For each task, in order, what it asked for or why it cannot be had.
        """

    def close(self) -> None:
        """Let go of threads and memory."""
