"""Synthetic samples with the interface of the indexed dataset, for ``--mock-data``: speed runs, tests, smoke tests.

Noise pictures in the shapes of web photos and random token ids, both a function of (seed, row): nothing is stored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_eve.data.dataset import planned_tiles, planned_visual_labels
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.family import CodeSizes, ImagePlan, ImagePlanner

# Width and height of the noise pictures, and how often: photo shapes at a quarter of their usual size. Only the
# ratio sets the token count, and small files keep the mock from measuring a JPEG decoder.
PHOTO_SHAPES = ((160, 120), (120, 160), (160, 107), (107, 160), (160, 90), (128, 128))
PHOTO_SHARES = (0.30, 0.10, 0.30, 0.10, 0.10, 0.10)
_TEXT_ONLY_SHARE = 1 / 16
_DRAWN_SHARE = 1 / 2  # of the pictures, where these are codes
_BOS_ID = 1
_FIRST_PLAIN_ID = 3  # after <unk>, <s>, </s>

_SAMPLE_FIELDS = np.dtype(
    [
        ("length", np.int32),
        ("text_length", np.int32),
        ("labels", np.int32),
        ("first_image", np.int64),
        ("num_images", np.int32),
    ]
)
_IMAGE_FIELDS = np.dtype([("width", np.int32), ("height", np.int32), ("num_bytes", np.int64)])


@dataclass(frozen=True)
class MockInfo:
    """The settings of a mock dataset that its readers ask for."""

    vocab_size: int
    template: str = "plain"
    apply_exif: bool = False
    max_pixels: int = 1 << 24


class MockDataset:
    """Caption samples of random content: ``<s><image> caption``, one in sixteen without an image.

    Where images are codes, half of them are to be drawn, and stand behind their caption, in front of its last token.
    """

    def __init__(
        self,
        size: int,
        *,
        vocab_size: int,
        planner: ImagePlanner,
        seq_length: int,
        seed: int,
        codes: CodeSizes | None = None,
    ) -> None:
        """
        Args:
            size: number of samples.
            vocab_size: token ids are drawn below it.
            planner: what pictures become.
            seq_length: no sample is longer than this, in tokens.
            seed: of shapes, lengths, texts, pictures and codes.
            codes: sizes of the codes of images; None: images have none.

        Raises:
            ValueError: a sequence length that has no room for a picture and a few words.
        """
        self.info = MockInfo(vocab_size=vocab_size)
        self.planner = planner
        self._seed = seed & ((1 << 63) - 1)
        self._plans = [planner(width, height) for width, height in PHOTO_SHAPES]
        image_tokens = np.array([plan.rows for plan in self._plans])
        tiles = np.array([plan.tiles for plan in self._plans])
        longest_text = seq_length - int(image_tokens.max())
        if longest_text < 8 or vocab_size <= _FIRST_PLAIN_ID or size < 1:
            raise ValueError(
                f"mock data needs --seq-length {int(image_tokens.max()) + 8} or more for its pictures "
                f"(it is {seq_length}), a vocabulary of more than {_FIRST_PLAIN_ID} (it is {vocab_size}) and "
                f"at least one sample (asked for: {size})"
            )
        random = np.random.default_rng((self._seed, 0))
        has_image = random.random(size) >= _TEXT_ONLY_SHARE
        caption = np.clip(random.lognormal(np.log(130.0), 0.45, size).astype(np.int64), 4, longest_text - 1)
        self._shapes = random.choice(len(PHOTO_SHAPES), int(has_image.sum()), p=PHOTO_SHARES)

        self.samples: NDArray[Any] = np.zeros(size, dtype=_SAMPLE_FIELDS)
        self.samples["text_length"] = 1 + caption
        self.samples["text_length"][has_image] += tiles[self._shapes].astype(np.int32)
        self.samples["length"] = 1 + caption
        self.samples["length"][has_image] += image_tokens[self._shapes].astype(np.int32)
        self.samples["labels"] = caption
        self.samples["first_image"] = np.cumsum(has_image) - has_image
        self.samples["num_images"] = has_image
        self.images: NDArray[Any] = np.zeros(len(self._shapes), dtype=_IMAGE_FIELDS)
        self.images["width"] = np.array(PHOTO_SHAPES)[self._shapes, 0]
        self.images["height"] = np.array(PHOTO_SHAPES)[self._shapes, 1]
        self._codes = codes
        self._drawn = np.zeros(len(self._shapes), dtype=np.bool_)
        if codes is not None:
            self._drawn = np.random.default_rng((self._seed, 3)).random(len(self._shapes)) < _DRAWN_SHARE

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] expanded tokens of each sample."""
        return self.samples["length"][indices].astype(np.int64)

    def tile_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] images of each sample, tile by tile."""
        return planned_tiles(self, indices)

    @property
    def code_depth(self) -> int:
        """Codes of a position of an image; 0 without codes."""
        return self._codes.depth if self._codes else 0

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Random codes of a picture: [h, w, D]."""
        assert self._codes is not None, "this mock data has no codes"
        random = np.random.default_rng((self._seed, 4, image))
        shape = (*self._codes.grid, self._codes.depth)
        return random.integers(0, self._codes.codebook_size, shape, dtype=np.uint16)

    def drawn(self, image: int) -> bool:
        """Is a picture to be drawn?"""
        return bool(self._drawn[image])

    def visual_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] rows of pictures of each sample that are to be drawn."""
        return planned_visual_labels(self, indices)

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([text_length] tokens, [text_length] unshifted labels), an image as one placeholder a tile."""
        sample = self.samples[index]
        placeholders = int(self.tile_counts(np.array([index]))[0])
        head = [_BOS_ID] + [IMAGE_TOKEN_ID] * placeholders
        random = np.random.default_rng((self._seed, 1, index))
        caption = random.integers(_FIRST_PLAIN_ID, self.info.vocab_size, int(sample["labels"]))
        if placeholders and self.drawn(int(sample["first_image"])):
            picture = head[1:]
            tokens = np.concatenate([[_BOS_ID], caption[:-1], picture, caption[-1:]]).astype(np.int64)
            return tokens, np.append(IGNORE_INDEX, tokens[1:])
        tokens = np.concatenate([np.array(head, dtype=np.int64), caption])
        labels = np.concatenate([np.full(len(head), IGNORE_INDEX, dtype=np.int64), caption])
        return tokens, labels

    def image_bytes(self, image: int) -> bytes:
        """A JPEG file of noise."""
        width, height = PHOTO_SHAPES[self._shapes[image]]
        noise = np.random.default_rng((self._seed, 2, image)).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(noise).save(file, format="JPEG", quality=75)
        return file.getvalue()

    def stored_pixels(self, image: int) -> None:
        """Pictures are files here."""

    def sample_name(self, index: int) -> str:
        """What a message calls a sample."""
        return f"mock sample {index}"

    def image_name(self, image: int) -> str:
        """What a message calls a picture."""
        return f"mock image {image}"

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Nothing is stored, so nothing can be read ahead."""

    def image_plan(self, image: int) -> ImagePlan:
        """What a picture becomes."""
        return self._plans[self._shapes[image]]
