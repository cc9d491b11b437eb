"""Pictures to pixel values for a VILA-U tower, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class VILAUImageProcessor(BaseImageProcessor):
    """The published preprocessing: a square of S x S by Pillow's bicubic filter, normalised to -1 .. 1.

    Args:
        image_size: S, in pixels.
        image_mean, image_std: of the three colours, on a scale from 0 to 1.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int = 256,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(
        self, images: Any, fit: str = "stretch", return_tensors: str = "pt", **_: Any
    ) -> BatchFeature:
        """Pictures to pixel values; they are turned as their EXIF says, and gray values of 16 bits are scaled.

        Args:
            images: a PIL image or a list of them.
            fit: stretch: the aspect ratio is lost, as of pictures that are read; square: the largest square is cut out
                first, the middle of a wide picture or the top of a tall one, as of pictures that are to be drawn.
            return_tensors: "pt" or "np".

        Returns:
            `pixel_values`: float32 [n, 3, S, S].
        """
        if fit not in ("stretch", "square"):
            raise ValueError(f"fit is {fit!r}, and stretch or square is needed")
        pictures = images if isinstance(images, list | tuple) else [images]
        squares = np.stack([np.asarray(self._square(_upright_rgb(image), fit)) for image in pictures])
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        values = torch.from_numpy(squares).float().div(255).sub(mean).div(std)
        return BatchFeature({"pixel_values": values.permute(0, 3, 1, 2)}, tensor_type=return_tensors)

    def postprocess(self, pictures: torch.Tensor) -> list[Image.Image]:
        """Pictures of `VILAUTowerModel.decode`, [n, 3, P, P], as PIL images."""
        values = pictures.float().add(1).mul(127.5).clamp(0, 255).round().to(torch.uint8)
        return [Image.fromarray(picture) for picture in values.permute(0, 2, 3, 1).cpu().numpy()]

    def _square(self, image: Image.Image, fit: str) -> Image.Image:
        if fit == "square":
            side = min(image.size)
            left = (image.width - side) // 2
            image = image.crop((left, 0, left + side, side))
        # In two steps, as Pillow 13 orders them, which every Pillow then rounds alike.
        size, (width, height) = self.image_size, image.size
        columns_first = size < height and height - size > 2 * (width - size)
        between = (width, size) if columns_first else (size, height)
        return image.resize(between, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned as the orientation of the file says."""
    rgb = _to_rgb(image)
    turn = _UPRIGHT.get(_orientation(image))
    return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) where there is none or it cannot be read. Only once decoded."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block is no reason to lose a picture that decodes
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _gray_to_rgb(_scale(np.asarray(image), (65535,)))
    if image.mode == "F":
        return _gray_to_rgb(_scale(np.asarray(image), (1, 255, 65535)))
    if image.mode == "RGB":  # of which convert makes a copy, which takes as long as decoding
        image.load()
        return image
    return image.convert("RGB")


def _scale(values: NDArray[np.generic], ranges: tuple[int, ...]) -> NDArray[np.uint8]:
    """Gray values to 0..255: from the first range 0..r that holds them all, else from their own span."""
    gray = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(gray.min()), float(gray.max())
    white = next((float(r) for r in ranges if low >= 0 and high <= r), 0.0)
    if not white:
        gray, white = gray - low, (high - low) or 1.0
    return np.rint(gray * (255.0 / white)).astype(np.uint8)


def _gray_to_rgb(gray: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(gray).convert("RGB")
