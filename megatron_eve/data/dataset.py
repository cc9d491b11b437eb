"""What batches and loaders ask of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_eve.models.family import ImagePlan, ImagePlanner


class VisionDataset(Protocol):
    """Samples and their images, by number; ``IndexedVisionDataset`` and ``MockDataset`` provide it."""

    @property
    def info(self) -> Any:
        """Holds ``apply_exif`` and ``max_pixels``, the settings the images were measured under."""

    @property
    def planner(self) -> ImagePlanner:
        """What pictures become."""

    @property
    def samples(self) -> Any:
        """[samples] indexed as a structured array with the fields ``length, labels, first_image, num_images``."""

    def __len__(self) -> int:
        """Number of samples."""

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Expanded tokens of each sample."""

    def tile_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of each sample, of which one that is cut into tiles counts as so many."""

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and unshifted labels of a sample, images not expanded."""

    def image_bytes(self, image: int) -> bytes:
        """The image file."""

    @property
    def code_depth(self) -> int:
        """Codes of a position of an image, D; 0 where images have no codes."""

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of an image: [h, w, D]."""

    def drawn(self, image: int) -> bool:
        """Is the image to be drawn (predicted)? Known without reading texts."""

    def visual_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] rows of those images of each sample that are to be drawn."""

    def stored_pixels(self, image: int) -> Mapping[str, NDArray[np.uint8]] | None:
        """The image as stored already decoded: each view, uint8 of `stored_shape`; None where it is a file."""

    def sample_name(self, index: int) -> str:
        """What a message calls a sample."""

    def image_name(self, image: int) -> str:
        """What a message calls an image."""

    def image_plan(self, image: int) -> ImagePlan:
        """What the image becomes, known without decoding."""

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Have the images of these samples read ahead, where that means anything."""


def planned_tiles(dataset: VisionDataset, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """`VisionDataset.tile_counts` from the plan of every image: of few samples, in memory."""
    counts = [
        sum(dataset.image_plan(first + i).tiles for i in range(count))
        for first, count in zip(
            *(dataset.samples[indices][name].tolist() for name in ("first_image", "num_images")), strict=True
        )
    ]
    return np.array(counts, dtype=np.int64)


def planned_visual_labels(dataset: VisionDataset, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """`VisionDataset.visual_labels`, likewise."""
    counts = [
        sum(dataset.image_plan(image).rows for image in range(first, first + count) if dataset.drawn(image))
        for first, count in zip(
            *(dataset.samples[indices][name].tolist() for name in ("first_image", "num_images")), strict=True
        )
    ]
    return np.array(counts, dtype=np.int64)


class WithoutCodes:
    """Of a dataset whose images have no codes, and are not to be drawn."""

    code_depth = 0

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Always an error."""
        raise ValueError("these images have no codes")

    def drawn(self, image: int) -> bool:
        """Always False."""
        return False

    def visual_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] zeros."""
        return np.zeros(len(indices), dtype=np.int64)


class Codes(Protocol):
    """Codes of the images of a dataset, by number; `data/format/code_part.py` provides it."""

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of an image: [h, w, D]."""


class WithOpenedCodes:
    """Of a dataset on disk, whose codes are another part of it.

    Attributes:
        code_depth: codes of a position of an image, once `use_codes` was called; else 0.
        opened_codes: what `use_codes` got.
    """

    prefix: str
    code_depth: int = 0
    opened_codes: Codes | None = None

    def use_codes(self, codes: Codes | None, depth: int) -> None:
        """Read the codes of images from these, which are those of this dataset; numbers run through all its images.

        Args:
            codes: None for a dataset without images.
            depth: of them.
        """
        self.opened_codes, self.code_depth = codes, depth

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of image `image`: [h, w, D].

        Raises:
            IndexError: no such image.
            DataError: a code is not below the size of the codebook.
        """
        if self.opened_codes is None:
            raise ValueError(f"no codes of {self.prefix} were opened")
        return self.opened_codes.codes(image)
