"""Zero-shot classification of pictures by a tower's contrastive side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from megatron_eve.data.images.squares import FITS, square_of
from megatron_eve.data.inspecting.reconstruction import one_thread
from megatron_eve.data.tokenizing.worker import code_device
from megatron_eve.inference.code_tower import ModelTower
from megatron_eve.models.registry import find_image_codes

_TOGETHER = 256  # texts that go through the text encoder at once


class Classifier:
    """Classes of pictures by their texts.

    Args:
        tower: whose contrastive side is loaded here.
        texts: folder of its tokenizer (`ImageCodes.text_folder`).

    Raises:
        ConfigError: the tower has no such side, or its weights or the tokenizer are damaged.
    """

    def __init__(self, tower: ModelTower, texts: Path) -> None:
        tower.check_weights()
        codes = find_image_codes(tower.family)
        self._device, self._size = code_device(), codes.square_size(tower.settings)
        self._model = codes.load_contrast(tower.settings, texts, self._device)
        self._classes: tuple[Sequence[Sequence[str]], torch.Tensor] | None = None

    def best(self, picture: Image.Image, classes: Sequence[Sequence[str]], count: int) -> list[int]:
        """Numbers of the most likely classes, the first one first.

        Args:
            picture: upright; it is resized to a square, as pictures that are read are.
            classes: texts of each class, one or more.
            count: of the numbers; fewer where there are fewer classes.
        """
        if self._classes is None or self._classes[0] is not classes:
            self._classes = classes, self._class_vectors(classes)
        square = torch.from_numpy(square_of(picture, FITS[0], self._size))
        with one_thread(self._device):
            vector = self._model.picture_vectors(square[None].to(self._device))[0]
            scores = self._classes[1] @ vector
        found: list[int] = scores.topk(min(count, len(classes))).indices.tolist()
        return found

    def _class_vectors(self, classes: Sequence[Sequence[str]]) -> torch.Tensor:
        """The mean vector of each class's texts, with length 1: float32 [classes, C]."""
        texts = [text for some in classes for text in some]
        starts = range(0, len(texts), _TOGETHER)
        with one_thread(self._device):
            vectors = torch.cat([self._model.text_vectors(texts[at : at + _TOGETHER]) for at in starts])
            means = [some.mean(0) for some in vectors.split([len(texts) for texts in classes])]
            return torch.nn.functional.normalize(torch.stack(means), dim=-1)
