"""Consecutive samples as the bytes that go into a dataset's files: a worker makes them, the writer appends them.

Image bytes are written by the worker that read them, at the offset that the writer assigns, so that they do not pass
through the single writer process.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.content_digest import digest_input_of_image, digest_input_of_text
from megatron_eve.data.format.drawn import drawn_in_text
from megatron_eve.data.format.manifest import (
    IMAGE_DTYPE,
    SAMPLE_DTYPE,
    DatasetSettings,
    count_labels,
    placeholder_problem,
    row_problem,
)
from megatron_eve.data.format.metadata import SampleMeta
from megatron_eve.models.registry import find_family

MAX_ROW_BYTES = 2**31 - 1
"""megatron-core keeps a row's length as int32."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image as it goes into a dataset: its bytes, and its size in pixels as it will be decoded.

    The bytes are those of a file, or with image storage "pixels" a row of OUT_pixels (see `IMAGE_STORAGES`). One with
    `drawn` is to be drawn (predicted); the label at its placeholder says the same.
    """

    data: bytes
    width: int
    height: int
    drawn: bool = False


class Sample(NamedTuple):
    """One sample.

    Attributes:
        tokens: n ids; each image is one IMAGE_TOKEN_ID.
        labels: n values, not shifted: the token where it trains, IMAGE_TOKEN_ID at an image that is to be drawn, else
            IGNORE_INDEX.
        images: one for each IMAGE_TOKEN_ID, in order.
        cut: the text was longer than `model_max_length`.
        meta: the source of the sample. Either all samples of a dataset have it or none has.
        num_missing: images that its source names but that were missing.
        changes: what else was left out or changed of it: counts by the names of `reasons.CHANGES`.
    """

    tokens: ArrayLike
    labels: ArrayLike
    images: Sequence[StoredImage]
    cut: bool = False
    meta: SampleMeta | None = None
    num_missing: int = 0
    changes: Mapping[str, int] = MappingProxyType({})


class SampleBlock(NamedTuple):
    """Samples without the bytes of their images.

    Attributes:
        text: their part of OUT_text.bin.
        text_sizes: int32 [samples], values of each in it.
        samples: SAMPLE_DTYPE [samples]; `first_image` is counted from the block's first image.
        images: IMAGE_DTYPE [images].
        drawn: bool [images], which are to be drawn.
        num_visual_labels: rows of these.
        digest_input: their part of what `ContentDigest` hashes.
        num_cut: samples that were cut.
        num_missing: missing images.
        changes: see `Sample`, of all.
        meta: of each sample, or empty.
    """

    text: bytes
    text_sizes: NDArray[np.int32]
    samples: NDArray[Any]
    images: NDArray[Any]
    drawn: NDArray[np.bool_]
    num_visual_labels: int
    digest_input: bytes
    num_cut: int
    num_missing: int
    changes: Mapping[str, int]
    meta: list[SampleMeta]


def make_block(samples: Sequence[Sample], settings: DatasetSettings) -> SampleBlock:
    """Check samples and lay them out.

    Args:
        samples: at least one.
        settings: of the dataset.

    Raises:
        DataError: the parts of a sample do not belong together, an id is not in the vocabulary, or an image has 2 GiB
            or more.
    """
    planner = find_family(settings.family).image_planner(settings.image_settings)
    texts: list[bytes] = []
    records: list[tuple[int, ...]] = []
    images: list[tuple[int, int, int]] = []
    drawn = [np.zeros(0, dtype=np.bool_)]
    num_visual_labels = 0
    digest_input: list[bytes] = []
    for number, sample in enumerate(samples):
        tokens, labels = (np.asarray(part, dtype=np.int64) for part in (sample.tokens, sample.labels))
        plans = [planner(image.width, image.height) for image in sample.images]
        problem = row_problem(tokens, labels, settings.vocab_size) or placeholder_problem(tokens, plans)
        if problem is None:
            found_drawn, problem = drawn_in_text(tokens, labels, plans)
            problem = problem or _drawn_problem(found_drawn, sample.images)
        if problem:
            raise DataError(f"sample {number} of the block: {problem}")
        drawn.append(found_drawn)
        num_visual_labels += sum(plan.rows for plan, one in zip(plans, found_drawn, strict=True) if one)
        length = len(tokens) + sum(plan.rows - plan.tiles for plan in plans)
        first_image = len(images)
        for image in sample.images:
            if len(image.data) > MAX_ROW_BYTES:
                raise DataError(f"an image of {len(image.data)} bytes: a row holds {MAX_ROW_BYTES}")
            images.append((image.width, image.height, len(image.data)))
            digest_input.append(digest_input_of_image(image.width, image.height, image.data))
        digest_input.append(digest_input_of_text(tokens, labels))
        texts.append(np.concatenate([tokens, labels]).astype("<i4").tobytes())
        records.append((length, len(tokens), count_labels(labels), len(sample.images), first_image))
    found = np.array(records, dtype=SAMPLE_DTYPE)
    return SampleBlock(
        b"".join(texts),
        2 * found["text_length"],
        found,
        np.array(images, dtype=IMAGE_DTYPE),
        np.concatenate(drawn),
        num_visual_labels,
        b"".join(digest_input),
        sum(sample.cut for sample in samples),
        sum(sample.num_missing for sample in samples),
        sum_changes(sample.changes for sample in samples),
        [sample.meta for sample in samples if sample.meta is not None],
    )


def _drawn_problem(found: NDArray[np.bool_], images: Sequence[StoredImage]) -> str | None:
    """What is wrong with the labels at images, of which `found` are to be drawn by their labels; or None."""
    wanted = np.array([image.drawn for image in images], dtype=np.bool_)
    if (found & ~wanted).any():
        return "a label is neither its token nor the value that is ignored: it is at an image that is not to be drawn"
    return "an image that is to be drawn has no label" if (wanted & ~found).any() else None


def sum_changes(some: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of `reasons.CHANGES`, added up; none of them is 0."""
    total: Counter[str] = Counter()
    for changes in some:
        total.update(changes)
    return {name: count for name, count in sorted(total.items()) if count}


class ImageBytes:
    """The .bin file of a dataset's images; each process writes its own part of it.

    Args:
        path: of the file, which must exist.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None

    def write(self, images: Sequence[bytes], offset: int) -> None:
        """Write images one after another, beginning at byte `offset`.

        Raises:
            OSError: such as a full disk; it names the file.
        """
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY)
        try:
            for image in images:
                left = memoryview(image)
                while left:  # one call takes at most 2 GiB
                    written = os.pwrite(self._file, left, offset)
                    left, offset = left[written:], offset + written
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
