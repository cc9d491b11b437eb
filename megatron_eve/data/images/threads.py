"""The fast way to decode on CPUs: simplejpeg (libjpeg-turbo) and torch's antialiased resize of bytes, in threads.

Threads, not processes: both libraries release Python's interpreter lock, and no pixels are copied between processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional

from megatron_eve.data.images.decode import ImageError, decode_image, read_header, upright
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Views
from megatron_eve.data.images.patches import finished, with_margins
from megatron_eve.data.images.resizing import LONGEST_SIDE_RATIO, Pixels, crop_window, fitted
from megatron_eve.data.images.tiles import cut_views, uncut_views
from megatron_eve.models.family import View


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
        found = {
            name: finished(_fitted(pixels, view), view) for name, view in uncut_views(task.views).items()
        }
        return {name: torch.from_numpy(view) for name, view in cut_views(found, task.views).items()}


def _fitted(pixels: Pixels, view: View) -> Pixels:
    """A decoded picture resized as a view says; see `resizing.fitted`, which does it to long pictures."""
    height, width, _ = pixels.shape
    if view.fit == "stretch":
        return _resize(pixels, view.height, view.width)
    if max(width, height) > LONGEST_SIDE_RATIO * min(width, height):
        return fitted(Image.fromarray(pixels), view)
    if view.fit == "crop":
        new_width, new_height, left, top = crop_window(width, height, view.width)
        return _resize(pixels, new_height, new_width)[
            top : top + view.height, left : left + view.width
        ].copy()
    # The longer side first: the margins are laid around what is small already.
    if width >= height:
        pixels, rows, columns = _resize(pixels, height, view.width), width, view.width
    else:
        pixels, rows, columns = _resize(pixels, view.height, width), view.height, height
    return _resize(with_margins(pixels, rows, columns, 1, view.pad_colour), view.height, view.width)


def _decode(data: bytes, settings: DecodeSettings) -> Pixels:
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


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]; bicubic with antialiasing, as Pillow's default."""
    # Channels first in shape but last in memory: the fastest layout for torch's resize of bytes.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
    resized = functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
