"""The tower of a model that reads pictures as codes, with its weights.

It makes codes of the pictures of prompts, and pictures of the codes that the model draws.

Shapes: n = pictures, P = side of a picture that is made of codes, h x w = positions, D = codes of a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.data.images.squares import FITS, square_of
from megatron_eve.data.inspecting.reconstruction import decoded_pictures, one_thread
from megatron_eve.data.tokenizing.worker import code_device, encode_squares
from megatron_eve.inference.code_tower import ModelTower
from megatron_eve.models.image_codes import CodeModel
from megatron_eve.models.registry import find_image_codes

_MOST_TOGETHER = 16  # pictures that go through the tower at once, as in tools/tokenize_images.py


class PictureCodes:
    """Codes are those that tools/tokenize_images.py makes of pictures that are read.

    Args:
        tower: of the model; its weights are loaded here, in the precision of the codes of the model's data.

    Raises:
        ConfigError: weights that are missing or damaged, or those of another tower than the model's.
    """

    def __init__(self, tower: ModelTower) -> None:
        tower.check_weights()
        self._tower, self._device = tower, code_device()
        self._codes = find_image_codes(tower.family)
        self._models: dict[str, CodeModel] = {}
        self._model(tower.dtype)

    def _model(self, dtype: str) -> CodeModel:
        """The tower in a precision, loaded when it is first used."""
        if dtype not in self._models:
            self._models[dtype] = self._codes.load_tower(
                self._tower.settings, self._device, getattr(torch, dtype)
            )
        return self._models[dtype]

    def codes(self, images: Sequence[bytes], apply_exif: bool) -> list[NDArray[np.int64]]:
        """Codes of pictures: int64 [h, w, D] each.

        Args:
            images: their files' bytes.
            apply_exif: turn them upright.

        Raises:
            ImageError: one that does not decode.
        """
        size = self.square_size
        found: list[NDArray[np.int64]] = []
        for first in range(0, len(images), _MOST_TOGETHER):
            squares = [
                square_of(
                    decode_image(data, apply_exif=apply_exif, max_pixels=DEFAULT_MAX_PIXELS), FITS[0], size
                )
                for data in images[first : first + _MOST_TOGETHER]
            ]
            with one_thread(self._device):
                found.extend(
                    encode_squares(self._model(self._tower.dtype), squares, len(squares), self._device)
                )
        return found

    @property
    def square_size(self) -> int:
        """Side of the square picture that the tower reads, S, in pixels."""
        return self._codes.square_size(self._tower.settings)

    def reconstruction(self, square: Pixels) -> Pixels:
        """The picture uint8 [P, P, 3] of the codes of a square uint8 [S, S, 3]."""
        with one_thread(self._device):
            codes = encode_squares(self._model(self._tower.dtype), [square], 1, self._device)
        picture: Pixels = self.pictures(torch.from_numpy(codes))[0]
        return picture

    def pictures(self, codes: torch.Tensor) -> Pixels:
        """Pictures uint8 [n, P, P, 3] of codes int64 [n, h, w, D], made in float32 whatever made the data's codes."""
        return decoded_pictures(self._model("float32"), codes, self._device)
