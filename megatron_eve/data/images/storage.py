"""Image files to what a dataset stores of them: JPEG files at the model's size, or pixels.

Image storage "encoded" needs nothing of this: files are kept as they are. The others decode several pictures at a time
with one of training's own decoders (`images/backends.py`), so that DALI gets batches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from megatron_eve.data.format.sample_block import StoredImage
from megatron_eve.data.geometry import ImageGeometry, image_geometry, square_margin
from megatron_eve.data.images import ImageError, decode_image, resize
from megatron_eve.data.images.backends import BackendName, chosen_backend, open_decoder
from megatron_eve.data.images.decode import read_header
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Prepared
from megatron_eve.data.images.patches import image_patches, uncut_patches


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How images are stored. Sizes in pixels.

    Attributes:
        image_storage: "jpeg" or "pixels".
        image_decoder: see `images/backends.py`.
        image_size: of the model.
        decode: what is the same for all pictures.
        jpeg_quality: 1 to 100.
        jpeg_subsampling: "420" or "444".
    """

    image_storage: str
    image_decoder: BackendName
    image_size: int
    decode: DecodeSettings
    jpeg_quality: int
    jpeg_subsampling: str

    @property
    def backend(self) -> BackendName:
        """The decoder that `image_decoder` stands for on this machine."""
        return chosen_backend(self.image_decoder, on_gpu=torch.cuda.is_available())

    def made_with(self) -> dict[str, Any]:
        """What the manifest says of the stored images."""
        said: dict[str, Any] = {"image_decoder": self.backend}
        if self.image_storage == "jpeg":
            return said | {"jpeg_quality": self.jpeg_quality, "jpeg_subsampling": self.jpeg_subsampling}
        return said | {
            "image_size": self.image_size,
            "teacher_size": self.decode.teacher_size,
            "teacher_patch_size": self.decode.teacher_patch_size,
        }

    def notice(self) -> str | None:
        """A sentence where DALI runs without a GPU, else None."""
        if self.backend != "dali" or torch.cuda.is_available():
            return None
        return "DALI decodes on the CPU: no GPU is seen here"


class ImageStore:
    """Turns image files into what is stored of them; one for each process.

    Args:
        settings: of the dataset.
        workers: processes that share the machine's cores.
    """

    def __init__(self, settings: StorageSettings, *, workers: int) -> None:
        self._settings = settings
        self._decoder = open_decoder(
            settings.backend,
            settings.decode,
            threads=max(len(os.sched_getaffinity(0)) // workers, 1),
            gpu=0 if torch.cuda.is_available() else None,
        )

    def store(self, files: Sequence[bytes]) -> list[StoredImage | ImageError]:
        """What is stored of each file, in order, or why it cannot be used."""
        results: list[StoredImage | ImageError | None] = [None] * len(files)
        tasks: dict[int, ImageTask] = {}
        sizes: dict[int, tuple[int, int]] = {}
        for number, data in enumerate(files):
            try:
                size = self._plain_size(data)
                if size is None or (self._as_jpeg and not self._shrinks(size)):
                    results[number] = self.with_pillow(data)
                    continue
            except ImageError as error:
                results[number] = error
                continue
            sizes[number] = size
            tasks[number] = ImageTask(data, self._geometry(size), True, not self._as_jpeg)
        for number, prepared in zip(tasks, self._decoder.prepare(list(tasks.values())), strict=True):
            if isinstance(prepared, ImageError):
                results[number] = prepared
                continue
            results[number] = self._stored(
                files[number], sizes[number], *self._arrays(prepared, tasks[number].geometry)
            )
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Let go of the decoder."""
        self._decoder.close()

    @property
    def _as_jpeg(self) -> bool:
        return self._settings.image_storage == "jpeg"

    def _geometry(self, size: tuple[int, int]) -> ImageGeometry:
        return image_geometry(*size, self._settings.image_size, self._settings.decode.teacher_size)

    def _shrinks(self, size: tuple[int, int]) -> bool:
        """Whether the model's size is nowhere above the picture's own: nothing is enlarged to be stored."""
        geometry = self._geometry(size)
        return geometry.width <= size[0] and geometry.height <= size[1]

    def _plain_size(self, data: bytes) -> tuple[int, int] | None:
        """Upright width and height from the head of a file; None where Pillow has to decode it to know."""
        header = read_header(data, self._settings.decode.max_pixels)
        return header.upright_size(self._settings.decode.apply_exif) if header.plain else None

    def with_pillow(self, data: bytes) -> StoredImage:
        """A file that no other decoder takes, or that stays as it is once Pillow has judged it."""
        decode = self._settings.decode
        image = decode_image(data, apply_exif=decode.apply_exif, max_pixels=decode.max_pixels)
        if self._as_jpeg and not self._shrinks(image.size):
            return StoredImage(data, *image.size)
        geometry = self._geometry(image.size)
        picture = None
        if not self._as_jpeg:
            picture = resize(image, *geometry.teacher_picture(decode.teacher_patch_size))
        return self._stored(data, image.size, image_patches(image, geometry), picture)

    def _arrays(
        self, prepared: Prepared, geometry: ImageGeometry
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Patches, and the teacher's picture without the margins of its square."""
        assert prepared.patches is not None
        patches = prepared.patches.cpu().numpy()
        if prepared.square is None:
            return patches, None
        decode = self._settings.decode
        width, height = geometry.teacher_picture(decode.teacher_patch_size)
        left, top = (
            square_margin(decode.teacher_side, side, decode.teacher_patch_size) for side in (width, height)
        )
        return patches, prepared.square[top : top + height, left : left + width].cpu().numpy()

    def _stored(
        self,
        data: bytes,
        size: tuple[int, int],
        patches: NDArray[np.uint8],
        picture: NDArray[np.uint8] | None,
    ) -> StoredImage:
        """One decoded picture as it is stored; a file that a JPEG file would not make smaller stays as it is."""
        if picture is not None:
            return StoredImage(patches.tobytes() + picture.tobytes(), *size)
        geometry = self._geometry(size)
        smaller = simplejpeg.encode_jpeg(
            uncut_patches(patches, geometry),
            quality=self._settings.jpeg_quality,
            colorspace="RGB",
            colorsubsampling=self._settings.jpeg_subsampling,
        )
        if len(smaller) >= len(data):
            return StoredImage(data, *size)
        return StoredImage(smaller, geometry.width, geometry.height)
