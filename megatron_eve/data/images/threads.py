"""The fast way to decode on CPUs: simplejpeg (libjpeg-turbo) and torch's antialiased resize of bytes, in threads.

Squares that are padded or cropped are made by Pillow, as the reference makes them.

Threads, not processes: both libraries release Python's interpreter lock, and no pixels are copied between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from megatron_eve.data.images.decode import ImageError, decode_image, read_header, upright
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Views
from megatron_eve.data.images.patches import finished, view_of


class ThreadsDecoder:
    """A pool of threads; each decodes one picture and makes its views."""

    def __init__(self, settings: DecodeSettings, *, threads: int) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="decode")

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """See `ImageDecoder`."""
        return list(self._pool.map(self._prepare, tasks))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, task: ImageTask) -> Views | ImageError:
        try:
            pixels = _decode(task.data, self._settings)
        except ImageError as error:
            return error
        # Channels first in shape but last in memory: the fastest layout for torch's resize of bytes.
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
        return {
            name: torch.from_numpy(
                finished(_resize(image, view.height, view.width), view)
                if view.fit == "stretch"
                else view_of(Image.fromarray(pixels), view)
            )
            for name, view in task.views.items()
        }


def _decode(data: bytes, settings: DecodeSettings) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]. Files that the fast decoder does not support or fails on are decoded by Pillow."""
    header = read_header(data, settings.max_pixels)
    if header.format == "JPEG" and header.plain:
        try:
            pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
        except ValueError:
            pass
        else:
            return upright(pixels, header.orientation) if settings.apply_exif else pixels
    return np.asarray(
        decode_image(data, apply_exif=settings.apply_exif, max_pixels=settings.max_pixels)
    ).copy()


def _resize(image: torch.Tensor, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 [1, 3, H, W] -> uint8 [height, width, 3]; bicubic with antialiasing, as Pillow's default."""
    resized = functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
