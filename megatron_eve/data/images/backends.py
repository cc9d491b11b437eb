"""One interface to decode pictures, and who implements it.

A pack's pictures are handed over together; what is wanted of each (the model's patches, the teacher's square) and at
which size is known from its geometry. Three backends give the same, to a few 8-bit levels:

- ``pillow``: the plain reference, bit-equal to the published preprocessing;
- ``threads``: a fast JPEG decoder and torch's antialiased resize of bytes, in threads; the default without a GPU;
- ``dali``: one DALI pipeline, on the GPU ("mixed", nvJPEG) or on the CPU; the default with a GPU.

What a backend cannot take goes to Pillow by itself. A picture that cannot be decoded is an answer (`ImageError`), never
the end of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from megatron_eve.config.validate import dali_is_installed
from megatron_eve.data.geometry import PATCH_SIZE, ImageGeometry, teacher_pixels
from megatron_eve.data.images.constants import PAD_COLOUR
from megatron_eve.data.images.decode import ImageError, decode_image
from megatron_eve.data.images.patches import image_patches, teacher_square

BackendName = Literal["auto", "dali", "threads", "pillow"]


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


def stand_in(task: ImageTask, settings: DecodeSettings) -> Prepared:
    """What replaces a picture that cannot be decoded: one of the pad colour, of the recorded shape.

    It depends on nothing but the shape, so both ends of a pipeline replace a picture by the same.
    """
    colour = torch.from_numpy(np.repeat(np.array(PAD_COLOUR, dtype=np.uint8), PATCH_SIZE * PATCH_SIZE))
    side = settings.teacher_side
    grey = torch.tensor(PAD_COLOUR, dtype=torch.uint8)
    return Prepared(
        colour.expand(task.geometry.patches, -1) if task.patches else None,
        grey.expand(side, side, 3) if task.teacher else None,
    )


def chosen_backend(name: BackendName, *, on_gpu: bool) -> BackendName:
    """The backend that a name stands for: "auto" takes DALI on a GPU where it is installed, else threads."""
    if name != "auto":
        return name
    return "dali" if on_gpu and dali_is_installed() else "threads"


def open_decoder(
    name: BackendName, settings: DecodeSettings, *, threads: int, gpu: int | None
) -> ImageDecoder:
    """Build a backend.

    Args:
        name: which, see `chosen_backend`.
        settings: of the dataset and rank.
        threads: that decode (DALI on a GPU: that feed it).
        gpu: index of the device that DALI decodes on, None without one.

    Raises:
        ImportError: ``dali`` where it is not installed.
    """
    name = chosen_backend(name, on_gpu=gpu is not None)
    if name == "dali":
        from megatron_eve.data.images.dali import DaliDecoder

        return DaliDecoder(settings, threads=threads, gpu=gpu)
    if name == "threads":
        from megatron_eve.data.images.threads import ThreadsDecoder

        return ThreadsDecoder(settings, threads=threads)
    return PillowDecoder(settings)
