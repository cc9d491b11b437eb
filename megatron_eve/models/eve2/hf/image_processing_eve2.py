"""Pictures to patches for EVE v2: the published sizes under either rule, and the published normalisation."""

from __future__ import annotations

import base64
import math
import os
import urllib.request
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
_SECONDS = 60  # to wait for an address


class EVE2ImageProcessor(BaseImageProcessor):
    """The published preprocessor_config.json (`eve-anyratio-res800-patch16`) and rules of size, patches a sample.

    Args:
        max_size: pixels of a picture, as the side of a square of as many: 800 or 1600.
        image_resize: how a picture gets its size. scale: all are made as large as that, sides rounded up to the next
            multiple of 32 (published evaluation); shrink: those above it are made smaller, sides rounded to the next
            multiple (published training).
        patch_stride: pixels of a patch's side.
        dense_stride: patches of a cell's side; a cell is one row of the decoder.
        image_mean, image_std: of the three colours, on a scale from 0 to 1.
    """

    model_input_names = ["pixel_values", "image_grids"]  # noqa: RUF012

    def __init__(
        self,
        max_size: int = 800,
        image_resize: str = "scale",
        patch_stride: int = 16,
        dense_stride: int = 2,
        image_mean: Sequence[float] = _CLIP_MEAN,
        image_std: Sequence[float] = _CLIP_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_size, self.image_resize = max_size, image_resize
        self.patch_stride, self.dense_stride = patch_stride, dense_stride
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of cells of a picture of this size in pixels.

        In the published order of operations, which decides in float64 on which side of a whole number a quotient falls.
        """
        cell = self.patch_stride * self.dense_stride
        ratio = math.sqrt(width * height) / self.max_size
        if self.image_resize == "scale":
            return max(math.ceil(height / ratio / cell), 1), max(math.ceil(width / ratio / cell), 1)
        if self.image_resize != "shrink":
            raise ValueError(f"image_resize is {self.image_resize!r}, and scale or shrink is needed")
        shrink = max(ratio, 1.0)
        return max(round(height / shrink / cell), 1), max(round(width / shrink / cell), 1)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: a picture, a list of them (one a sample), or a list of lists. A picture is a PIL image, an array
                (uint8 [H, W, 3], or gray [H, W]), a path, an address (http) or the file in base64.
            return_tensors: "pt", the only kind there is.

        Returns:
            pixel_values: float32 [B, N, 768], patches of a sample's pictures one after another, zeros behind them.
            image_grids: int64 [B, M, 2], rows and columns of cells, zeros for pictures a sample lacks.
        """
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is supported")
        samples = [[self._patches(image) for image in sample] for sample in nested(images)]
        pixels = [
            torch.cat([patches for patches, _ in sample] or [torch.zeros(0, self._values)])
            for sample in samples
        ]
        grids = [
            torch.tensor([grid for _, grid in sample], dtype=torch.int64).reshape(len(sample), 2)
            for sample in samples
        ]
        pad = torch.nn.utils.rnn.pad_sequence
        return BatchFeature(
            {"pixel_values": pad(pixels, batch_first=True), "image_grids": pad(grids, batch_first=True)}
        )

    @property
    def _values(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch_stride**2

    def _patches(self, image: Any) -> tuple[torch.Tensor, tuple[int, int]]:
        """Float32 [P, 768]: cells row by row, in each its patches row by row, in a patch (channel, y, x)."""
        picture = _upright_rgb(_opened(image))
        rows, columns = self.grid(*picture.size)
        side = self.dense_stride * self.patch_stride
        width, height = columns * side, rows * side
        # Rows first, then columns, as every Pillow before 13 does by itself.
        resized = torch.from_numpy(np.array(picture.resize((width, picture.height)).resize((width, height))))
        stride, patch = self.dense_stride, self.patch_stride
        grid = resized.view(rows, stride, patch, columns, stride, patch, 3)
        patches = grid.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, patch * patch).float()
        mean, std = (torch.tensor(values)[:, None] for values in (self.image_mean, self.image_std))
        return patches.div(255).sub(mean).div(std).flatten(1), (rows, columns)


def nested(images: Any) -> list[list[Any]]:
    """Pictures of each sample: a single picture, and a picture a sample, are given their lists."""
    samples = images if isinstance(images, (list, tuple)) else [images]
    return [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in samples]


def _opened(image: Any) -> Image.Image:
    """A picture as it is stored; `load_image` of transformers would clip gray of more than 8 bits to white."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not isinstance(image, str):
        raise TypeError(f"a picture is a PIL image, an array or a string, not {type(image)}")
    if image.startswith(("http://", "https://")):
        request = urllib.request.Request(image, headers={"User-Agent": "transformers"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            return Image.open(BytesIO(response.read()))
    if os.path.isfile(image):
        return Image.open(image)
    encoded = image.partition("base64,")[2] or image
    try:
        return Image.open(BytesIO(base64.decodebytes(encoded.encode())))
    except Exception as error:
        raise ValueError(f"neither a picture file nor an address nor base64: {image[:80]!r}") from error


# From here on: as `megatron_eve.data.images.decode` does it, which a run trains on.


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
