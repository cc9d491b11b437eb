"""Requests to models that read and draw pictures as codes: pictures drawn from texts, reconstructed, and classified."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, decode_image
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.data.images.squares import square_of
from megatron_eve.evaluation.answers import Answered, write_picture
from megatron_eve.evaluation.requests import Request
from megatron_eve.inference.code_tower import ModelTower
from megatron_eve.inference.engine import BatchDrawingEngine, DrawingQuery, Engine

if TYPE_CHECKING:
    from megatron_eve.inference.classification import Classifier
    from megatron_eve.inference.picture_codes import PictureCodes

BEST_CLASSES = 5
"""Classes that an answer names."""


class PictureAnswering:
    """Answers batches of `PICTURE_KINDS`; what it needs of the tower is loaded for the first request that needs it.

    Args:
        folder: of the answers, which gets the pictures.
        tower: of the model.
        texts: folder of the tokenizer for texts of classes; None where nothing is classified.
        apply_exif: turn pictures that are classified upright.
    """

    def __init__(
        self, folder: Path, tower: ModelTower, texts: Path | None = None, apply_exif: bool = True
    ) -> None:
        self._folder, self._tower, self._texts, self._apply_exif = folder, tower, texts, apply_exif
        self._codes: PictureCodes | None = None
        self._classifier: Classifier | None = None

    def answers(self, batch: Sequence[Request], engine: Engine | None) -> list[Answered]:
        """The answers to requests of one kind, in order; their pictures are on disk."""
        if batch[0].kind == "draw":
            return self._drawn(batch, engine)
        one = self._reconstructed if batch[0].kind == "reconstruct" else self._classified
        return [one(request) for request in batch]

    def _drawn(self, batch: Sequence[Request], engine: Engine | None) -> list[Answered]:
        if not isinstance(engine, BatchDrawingEngine):
            raise ConfigError(
                f"--tasks {batch[0].task}: this model draws no pictures; name a checkpoint of one that does"
            )
        prepared: list[DrawingQuery | SkipRow] = []
        for request in batch:
            try:
                prepared.append(engine.prepare_drawing(request.context, request.key))
            except SkipRow as error:
                prepared.append(error)
        answered = [Answered(error=str(one)) for one in prepared]
        # Requests of one batch may ask for other settings, and each group of equal ones is drawn together.
        groups: dict[object, list[int]] = {}
        for number, (request, one) in enumerate(zip(batch, prepared, strict=True)):
            if isinstance(one, DrawingQuery):
                groups.setdefault((request.guidance, request.sampling), []).append(number)
        for numbers in groups.values():
            first = batch[numbers[0]]
            queries = [one for number in numbers if isinstance(one := prepared[number], DrawingQuery)]
            drawn = engine.pictures(queries, first.guidance, first.sampling)
            for number, pixels in zip(numbers, drawn, strict=True):
                answered[number] = Answered(write_picture(self._folder, batch[number], pixels))
        return answered

    def _reconstructed(self, request: Request) -> Answered:
        if self._codes is None:
            from megatron_eve.inference.picture_codes import PictureCodes

            self._codes = PictureCodes(self._tower)
        try:
            # Always upright, as the score takes it to be.
            image, picture = _opened(request, apply_exif=True)
        except SkipRow as error:
            return Answered(error=str(error))
        pixels = self._codes.reconstruction(middle_square(picture, self._codes.square_size))
        return Answered(write_picture(self._folder, request, pixels), images=picture_digests([image]))

    def _classified(self, request: Request) -> Answered:
        if self._classifier is None:
            from megatron_eve.inference.classification import Classifier

            assert self._texts is not None
            self._classifier = Classifier(self._tower, self._texts)
        try:
            image, picture = _opened(request, self._apply_exif)
        except SkipRow as error:
            return Answered(error=str(error))
        best = self._classifier.best(picture, request.classes, BEST_CLASSES)
        return Answered(" ".join(map(str, best)), images=picture_digests([image]))


def _opened(request: Request, apply_exif: bool) -> tuple[bytes, Image.Image]:
    """The picture of a request: its file, and decoded."""
    image = given_picture(request)
    return image, decode_image(image, apply_exif=apply_exif, max_pixels=DEFAULT_MAX_PIXELS)


def given_picture(request: Request) -> bytes:
    """The file of the one picture of a request.

    Raises:
        SkipRow: it cannot be opened.
    """
    assert request.conversation is not None
    (image,) = request.conversation().images
    return image


def middle_square(picture: Image.Image, size: int) -> Pixels:
    """The middle of a picture as a square, uint8 [size, size, 3]: what an rFID is measured on."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(square_of(picture.crop((left, top, left + side, top + side)), "stretch", size))


def picture_digests(images: Sequence[bytes]) -> tuple[str, ...]:
    """The sha256 of each picture, for its answer."""
    return tuple(hashlib.sha256(image).hexdigest() for image in images)
