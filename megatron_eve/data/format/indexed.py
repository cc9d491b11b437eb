"""Open datasets: megatron-core indexed datasets of token ids and image files, joined by a manifest.

`manifest` lists the files, `indexed_writer` writes them. megatron-core is imported only when the first row is read,
since the import takes seconds; the check whether a run can train on a dataset does not need it.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.dataset import WithOpenedCodes
from megatron_eve.data.errors import AGAIN, DataError
from megatron_eve.data.format.compatible import check_compatible
from megatron_eve.data.format.drawn import DRAWN, drawn_in_text, open_drawn
from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.format.manifest import (
    IMAGE_DTYPE,
    MANIFEST,
    PIXELS,
    SAMPLE_DTYPE,
    DatasetInfo,
    DatasetSettings,
    count_labels,
    megatron_datasets,
    open_records,
    placeholder_problem,
    read_info,
    row_problem,
)
from megatron_eve.data.format.megatron_index import check_index
from megatron_eve.data.format.sample_block import StoredImage
from megatron_eve.data.images.patches import stored_shape
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.image_flags import ImageSettings
from megatron_eve.models.registry import find_family

__all__ = ["DatasetInfo", "DatasetSettings", "DatasetWriter", "IndexedVisionDataset", "StoredImage"]


# Image plans kept in memory, one for each picture size: under a kilobyte each.
_KEPT_PLANS = 1 << 14


class IndexedVisionDataset(WithOpenedCodes):
    """A dataset on disk, opened read-only; see `manifest` for its files.

    Args:
        prefix: the --output-prefix it was written to.
        mmap_bin_files: map the two .bin files into memory; False reads each row with a system call.

    Attributes:
        info: the manifest.
        samples: SAMPLE_DTYPE [samples], mapped.
        images: IMAGE_DTYPE [images], mapped (an empty array if there is no image).
        planner: gives the image plan of a width and height; see `use_image_settings`.

    Raises:
        DataError: a part is missing, truncated, of another version, or does not match the manifest.
    """

    def __init__(self, prefix: str | Path, *, mmap_bin_files: bool = True) -> None:
        self.prefix = str(prefix)
        self.info = info = read_info(self.prefix)
        self.samples = open_records(self.prefix + "_samples.npy", SAMPLE_DTYPE, info.num_samples)
        check_index(self.prefix + "_text", np.dtype(np.int32), info.num_samples, info.text_bytes)
        self.images: NDArray[Any] = np.empty(0, dtype=IMAGE_DTYPE)
        if info.num_images:
            self.images = open_records(self.prefix + "_images.npy", IMAGE_DTYPE, info.num_images)
            check_index(
                self.prefix + self._image_part, np.dtype(np.uint8), info.num_images, info.stored_bytes
            )
        self._drawn = open_drawn(self.prefix, info)
        self._mmap_bin_files = mmap_bin_files
        self.use_image_settings(info.family, {})

    def use_image_settings(self, family: str, settings: ImageSettings) -> None:
        """Plan images for a run of this family and these image settings.

        The settings recorded in the dataset are kept. A dataset without images fits any. If it holds image files,
        settings that change only the decoded pixels are taken from the run.

        Raises:
            DataError: the settings do not go together.
        """
        found = find_family(family)
        if self.info.num_images:
            limits = {name: flag.default for name, flag in found.image_flags.items() if flag.at_most}
            settings = {**settings, **limits, **self.info.made_for}
        try:
            self.planner = lru_cache(_KEPT_PLANS)(found.image_planner(settings))
        except ValueError as error:
            remedy = f"; {AGAIN}" if self.info.num_images else ""
            raise DataError(f"{self.prefix}{MANIFEST}: {error}{remedy}") from error

    @cached_property
    def _text(self) -> Any:
        return self._megatron_dataset("_text")

    @cached_property
    def _image(self) -> Any:
        return self._megatron_dataset(self._image_part) if self.info.num_images else None

    @property
    def _image_part(self) -> str:
        """Suffix of the files that hold the images."""
        return "_pixels" if self.info.image_storage == PIXELS else "_image"

    def _megatron_dataset(self, part: str) -> Any:
        return megatron_datasets("indexed_dataset").IndexedDataset(
            self.prefix + part, mmap=self._mmap_bin_files
        )

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def sample_files(self) -> list[Path]:
        """The file with the records of its samples; a merged dataset has several."""
        return [Path(self.prefix + "_samples.npy")]

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the samples at `indices` once images are expanded: int64, of the shape of `indices`."""
        return self.samples["length"][indices].astype(np.int64)

    def tile_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of the samples at `indices`, of which one that is cut into tiles counts as so many: int64 [n]."""
        if not (self.info.num_images and self.planner(1, 1).is_tiled):
            return np.maximum(self.samples["num_images"][indices], 0).astype(np.int64)
        images, owner = self._images_of(indices)
        return np.bincount(owner, self._planned(images, lambda plan: plan.tiles), len(indices)).astype(
            np.int64
        )

    def visual_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of those images of the samples at `indices` that are to be drawn: int64 [n]."""
        if self._drawn is None:
            return np.zeros(len(indices), dtype=np.int64)
        images, owner = self._images_of(indices)
        drawn = np.array(self._drawn[images])
        rows = self._planned(images[drawn], lambda plan: plan.rows)
        return np.bincount(owner[drawn], rows, len(indices)).astype(np.int64)

    def _images_of(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Images of samples, one after another, and the number of the sample of each: int64 [m] both."""
        samples = self.samples[indices]
        counts = np.maximum(samples["num_images"], 0).astype(np.int64)
        owner = np.repeat(np.arange(len(counts)), counts)
        images = np.arange(len(owner)) + (samples["first_image"] - counts.cumsum() + counts)[owner]
        # A record that names no images, or images without area, is refused when its text is read.
        return images.clip(0, max(len(self.images) - 1, 0)), owner

    def _planned(self, images: NDArray[np.int64], of: Callable[[ImagePlan], int]) -> NDArray[np.int64]:
        """A number of the plan of each of these images."""
        records = self.images[images]
        sizes = (records["width"].astype(np.int64) << 32) + records["height"]
        found, which = np.unique(sizes, return_inverse=True)
        plans = [self.planner(max(int(size >> 32), 1), max(int(size & 0xFFFFFFFF), 1)) for size in found]
        return np.array([of(plan) for plan in plans], dtype=np.int64)[which]

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and labels of sample `index`: int64 [n] each, images not expanded, labels not shifted.

        Raises:
            IndexError: no such sample.
            DataError: the row does not match its record, or holds an id that is not in the vocabulary.
        """
        index = _checked_index(index, len(self))
        sample = self.samples[index]
        length = int(sample["text_length"])
        row = self._row(self._text, "_text", index, 2 * length).astype(np.int64)
        tokens, labels = row[:length], row[length:]
        problem = row_problem(tokens, labels, self.info.vocab_size)
        if problem:
            raise DataError(f"row {index} of {self.prefix}_text.bin: {problem}; {AGAIN}")
        self._check_record(index, tokens, labels)
        return tokens, labels

    def _check_record(self, index: int, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Packs and loss denominators were computed from the record, so the text must agree with it."""
        sample = self.samples[index]
        first, count = int(sample["first_image"]), int(sample["num_images"])
        if not 0 <= first <= len(self.images) - count:
            problem = f"images {first} .. {first + count - 1} of {len(self.images)}"
        else:
            plans = [self.image_plan(first + i) for i in range(count)]
            if misplaced := placeholder_problem(tokens, plans):
                raise DataError(f"row {index} of {self.prefix}_text.bin: {misplaced}; {AGAIN}")
            length = len(labels) + sum(plan.rows - plan.tiles for plan in plans)
            self._check_drawn(index, tokens, labels, plans)
            trained = count_labels(labels)
            if (length, trained) == (sample["length"], sample["labels"]):
                return
            problem = (
                f"{sample['length']} tokens and {sample['labels']} labels where its row and its images have "
                f"{length} and {trained}"
            )
        raise DataError(f"record {index} of {self.prefix}_samples.npy says {problem}; {AGAIN}")

    def _check_drawn(
        self, index: int, tokens: NDArray[np.int64], labels: NDArray[np.int64], plans: Sequence[ImagePlan]
    ) -> None:
        """The loss of codes is divided by what the part says, so the labels must agree with it."""
        first = int(self.samples[index]["first_image"])
        recorded = np.array([self.drawn(first + i) for i in range(len(plans))], dtype=np.bool_)
        drawn, problem = drawn_in_text(tokens, labels, plans)
        if problem is None and (drawn != recorded).any():
            problem = (
                f"its labels say that {drawn.sum()} of {len(plans)} images are to be drawn, which is not what "
                f"{self.prefix}{DRAWN} says"
            )
        if problem is not None:
            raise DataError(f"row {index} of {self.prefix}_text.bin: {problem}; {AGAIN}")

    def drawn(self, image: int) -> bool:
        """Is image `image` to be drawn (predicted)?

        Raises:
            IndexError: no such image.
        """
        image = _checked_index(image, len(self.images))
        return self._drawn is not None and bool(self._drawn[image])

    def image_bytes(self, image: int) -> bytes:
        """The bytes of the file of image `image`, as stored.

        Raises:
            IndexError: no such image.
            DataError: the row does not match its record, or the images are stored as pixels.
        """
        record = self.images[_checked_index(image, len(self.images))]
        if self.info.image_storage == PIXELS:
            raise DataError(
                f"{self.prefix} holds pixels and no image files: preprocess again with --image-storage encoded "
                "where files are needed"
            )
        return self._row(self._image, self._image_part, image, int(record["num_bytes"])).tobytes()

    def stored_pixels(self, image: int) -> dict[str, NDArray[np.uint8]] | None:
        """Image `image` as it was decoded when the dataset was made; None where the dataset holds files.

        Returns:
            Each view by name: uint8 of its `stored_shape`, which has no padding to a square.

        Raises:
            IndexError: no such image.
            DataError: the row does not match its record.
        """
        if self.info.image_storage != PIXELS:
            return None
        record = self.images[_checked_index(image, len(self.images))]
        shapes = {name: stored_shape(view) for name, view in self.image_plan(image).views.items()}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        expected = int(ends[-1])
        if int(record["num_bytes"]) != expected:
            raise DataError(
                f"record {image} of {self.prefix}_images.npy says {record['num_bytes']} bytes of pixels where its size "
                f"gives {expected}; {AGAIN}"
            )
        row = self._row(self._image, self._image_part, image, expected)
        parts = np.split(row, ends[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages."""
        return f"row {index} of {self.prefix}"

    def image_name(self, image: int) -> str:
        """Name of an image in messages."""
        return f"image {image} of {self.prefix}"

    def image_plan(self, image: int) -> ImagePlan:
        """The plan of image `image` (its views and tokens), from its recorded size alone.

        Raises:
            IndexError: no such image.
            DataError: the record has a width or height of 0.
        """
        record = self.images[_checked_index(image, len(self.images))]
        width, height = int(record["width"]), int(record["height"])
        if min(width, height) < 1:
            raise DataError(
                f"record {image} of {self.prefix}_images.npy says {width} x {height} pixels; {AGAIN}"
            )
        return self.planner(width, height)

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Ask the operating system to read the images of these samples ahead, if the files are mapped."""
        reader = getattr(self._image, "bin_reader", None)
        mapped = getattr(getattr(reader, "_bin_buffer_mmap", None), "_mmap", None)
        if mapped is None:
            return
        assert self._image is not None
        for sample in self.samples[indices]:
            first, count = int(sample["first_image"]), int(sample["num_images"])
            if not (count > 0 and 0 <= first <= len(self.images) - count):
                continue  # no image, or a damaged record, which is reported when the sample is read
            # The images of a sample are stored one after another; madvise needs the start of a page.
            start = int(self._image.index[first][0])
            end = start + int(self.images["num_bytes"][first : first + count].astype(np.int64).sum())
            start -= start % mmap.PAGESIZE
            if 0 <= start < end <= len(mapped):
                mapped.madvise(mmap.MADV_WILLNEED, start, end - start)

    def check_compatible(
        self,
        *,
        tokenizer_sha256: str | None,
        vocab_size: int,
        family: str,
        image_settings: ImageSettings,
    ) -> None:
        """Check that a run can train on this dataset. Samples that are too long for it are left out later.

        Args:
            tokenizer_sha256: digest of the run's tokenizer file; None leaves it unchecked.
            vocab_size: of the run's model, without megatron-core's padding. It may be up to `max_padding_rows` larger
                than the tokenizer, as published embeddings are.
            family: of the run; a dataset of text alone fits any.
            image_settings: of the run's model (`ModelFamily.image_settings`); a dataset of text alone fits any, and
                settings that the dataset does not record are not checked.

        Raises:
            DataError: the run cannot train on it; the message names the file, what differs and the remedy.
        """
        check_compatible(self.prefix, self.info, tokenizer_sha256, vocab_size, family, image_settings)

    def _row(self, indexed: Any, part: str, row: int, expected: int) -> NDArray[Any]:
        """A copy of one row: the array that megatron-core returns is a view into its dataset's memory map."""
        pointer, length, _ = indexed.index[int(row)]
        itemsize = np.dtype(indexed.index.dtype).itemsize
        size = self.info.text_bytes if part == "_text" else self.info.stored_bytes
        if length != expected or not 0 <= pointer <= size - expected * itemsize:
            raise DataError(
                f"row {row} of {self.prefix}{part}.idx has {length} values at byte {pointer} where "
                f"{expected} are recorded: {AGAIN}"
            )
        return np.array(indexed[int(row)])


def _checked_index(index: int, size: int) -> int:
    if not 0 <= index < size:
        raise IndexError(f"index {index} is out of range for {size} rows")
    return int(index)
