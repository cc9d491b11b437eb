"""Convert image files to the form that a dataset stores: JPEG files at the model's size, or pixels.

Not used by image storage "encoded", which keeps the files. Several pictures are decoded at a time by one of training's
decoders (`images/backends.py`), so that DALI gets batches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from megatron_eve.data.format.manifest import bound_flags
from megatron_eve.data.format.sample_block import StoredImage
from megatron_eve.data.images import ImageError, decode_image
from megatron_eve.data.images.backends import BackendName, chosen_backend, open_decoder
from megatron_eve.data.images.decode import read_header
from megatron_eve.data.images.interface import DecodeSettings, ImageTask
from megatron_eve.data.images.patches import picture_of, to_stored, view_of
from megatron_eve.data.images.resizing import enlarges
from megatron_eve.models.family import View
from megatron_eve.models.image_flags import ImageSettings
from megatron_eve.models.registry import find_family


@dataclass(frozen=True, kw_only=True)
class StorageSettings:
    """How images are stored.

    Attributes:
        image_storage: "jpeg" or "pixels".
        image_decoder: see `images/backends.py`.
        family: name of the model family.
        image_settings: of the model, by name (`ModelFamily.image_flags`).
        decode: settings of the decoder.
        jpeg_quality: 1 to 100.
        jpeg_subsampling: "420" or "444".
    """

    image_storage: str
    image_decoder: BackendName
    family: str
    image_settings: ImageSettings
    decode: DecodeSettings
    jpeg_quality: int
    jpeg_subsampling: str

    @property
    def backend(self) -> BackendName:
        """The backend that `image_decoder` selects on this machine."""
        return chosen_backend(self.image_decoder, on_gpu=torch.cuda.is_available())

    def made_with(self) -> dict[str, Any]:
        """The manifest's entry for the stored images."""
        manifest_entry: dict[str, Any] = {"image_decoder": self.backend}
        if self.image_storage == "jpeg":
            flags = bound_flags(find_family(self.family).image_flags, self.image_storage)
            bound = {name: self.image_settings[name] for name in flags}
            quality = {"jpeg_quality": self.jpeg_quality, "jpeg_subsampling": self.jpeg_subsampling}
            return manifest_entry | bound | quality
        return manifest_entry | dict(self.image_settings)

    def notice(self) -> str | None:
        """A warning if DALI runs without a GPU, else None."""
        if self.backend != "dali" or torch.cuda.is_available():
            return None
        return "DALI decodes on the CPU: no GPU is seen here"


class ImageStore:
    """Converts image files to the stored form; one for each process.

    Args:
        settings: of the dataset.
        workers: number of processes that share the machine's cores.
    """

    def __init__(self, settings: StorageSettings, *, workers: int) -> None:
        self._settings = settings
        self._planner = find_family(settings.family).image_planner(settings.image_settings)
        self._decoder = open_decoder(
            settings.backend,
            settings.decode,
            threads=max(len(os.sched_getaffinity(0)) // workers, 1),
            gpu=0 if torch.cuda.is_available() else None,
        )

    def store(self, files: Sequence[bytes]) -> list[StoredImage | ImageError]:
        """The stored form of each file, in order, or the error if it cannot be used."""
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
            tasks[number] = ImageTask(data, self._views(size))
        for number, decoded in zip(tasks, self._decoder.prepare(list(tasks.values())), strict=True):
            if isinstance(decoded, ImageError):
                results[number] = decoded
                continue
            pixels = {name: tensor.cpu().numpy() for name, tensor in decoded.items()}
            results[number] = self._stored(files[number], sizes[number], pixels)
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Close the decoder."""
        self._decoder.close()

    @property
    def _as_jpeg(self) -> bool:
        return self._settings.image_storage == "jpeg"

    def _views(self, size: tuple[int, int]) -> Mapping[str, View]:
        """The views that are stored for a picture of this size: all of them, or the first as a JPEG file."""
        views = self._planner(*size).views
        return dict(list(views.items())[:1]) if self._as_jpeg else views

    def _shrinks(self, size: tuple[int, int]) -> bool:
        """True if the view is not larger than the picture: pictures are not enlarged for storage."""
        return not enlarges(next(iter(self._views(size).values())), *size)

    def _plain_size(self, data: bytes) -> tuple[int, int] | None:
        """Upright width and height from the head of a file; None where Pillow has to decode it to know."""
        header = read_header(data, self._settings.decode.max_pixels)
        return header.upright_size(self._settings.decode.apply_exif) if header.plain else None

    def with_pillow(self, data: bytes) -> StoredImage:
        """Decode with Pillow a file that no other decoder can read, or check one that is stored unchanged."""
        decode = self._settings.decode
        image = decode_image(data, apply_exif=decode.apply_exif, max_pixels=decode.max_pixels)
        if self._as_jpeg and not self._shrinks(image.size):
            return StoredImage(data, *image.size)
        pixels = {name: view_of(image, view) for name, view in self._views(image.size).items()}
        return self._stored(data, image.size, pixels)

    def _stored(
        self, data: bytes, size: tuple[int, int], pixels: Mapping[str, NDArray[np.uint8]]
    ) -> StoredImage:
        """One decoded picture as it is stored; a file that a JPEG file would not make smaller stays as it is."""
        views = self._views(size)
        if not self._as_jpeg:
            stored = (to_stored(pixels[name], view) for name, view in views.items())
            return StoredImage(b"".join(view.tobytes() for view in stored), *size)
        ((name, view),) = views.items()
        smaller = simplejpeg.encode_jpeg(
            np.ascontiguousarray(picture_of(pixels[name], view)),
            quality=self._settings.jpeg_quality,
            colorspace="RGB",
            colorsubsampling=self._settings.jpeg_subsampling,
        )
        if len(smaller) >= len(data):
            return StoredImage(data, *size)
        return StoredImage(smaller, view.width, view.height)
