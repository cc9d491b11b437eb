"""Several datasets with the interface of one: their samples and images are numbered consecutively.

`JoinedDataset` joins the datasets of a run; `MergedDataset` joins those that a manifest names
(`data/format/merging.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.dataset import WithOpenedCodes
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.manifest import MANIFEST, SAMPLE_DTYPE, DatasetInfo, read_info
from megatron_eve.data.text.text_tokenizer import SAME_KIND
from megatron_eve.models.family import ImagePlan, ImagePlanner
from megatron_eve.models.image_flags import ImageSettings


class JoinedSamples:
    """The sample records of several datasets, indexed as one structured array; copies only requested records."""

    def __init__(self, datasets: Sequence[AnyDataset], first_images: NDArray[np.int64]) -> None:
        self._samples = [dataset.samples for dataset in datasets]
        self._first_images = first_images
        self._bounds = np.cumsum([len(samples) for samples in self._samples])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, indices: Any) -> Any:
        """Records at an index or an array of them: SAMPLE_DTYPE, ``first_image`` counted over all datasets.

        A field's name gives that field of all samples, unchanged (`first_image` counts within each dataset then).
        """
        if isinstance(indices, str):
            return np.concatenate([samples[indices] for samples in self._samples])
        wanted = np.asarray(indices, dtype=np.int64)
        which = np.searchsorted(self._bounds, wanted, side="right")
        records = np.empty(wanted.shape, dtype=SAMPLE_DTYPE)
        for number in np.unique(which):
            here = which == number
            samples = self._samples[number]
            records[here] = samples[wanted[here] - (self._bounds[number] - len(samples))]
        records["first_image"] += self._first_images[which]
        return records[()]


class JoinedDataset:
    """Several datasets as one, opened by one run.

    Attributes:
        info: the manifest of the first with images; ``max_pixels`` is the largest of all with images.
        samples: SAMPLE_DTYPE, indexed like an array (see `JoinedSamples`).

    Raises:
        DataError: the datasets' images were not turned upright alike, or their tokenizers differ. A dataset of text
            alone goes with any treatment of images.
    """

    info: DatasetInfo
    samples: JoinedSamples

    def __init__(self, datasets: Sequence[AnyDataset]) -> None:
        """
        Args:
            datasets: at least one, in the order in which samples and images are counted.
        """
        with_images = [dataset for dataset in datasets if dataset.info.num_images] or datasets[:1]
        for alike, name, remedy in (
            (datasets, "tokenizer_sha256", "preprocess both with the same --tokenizer-model"),
            (with_images, "apply_exif", "preprocess both with or without --ignore-exif-orientation"),
        ):
            first = alike[0]
            for dataset in alike[1:]:
                if getattr(dataset.info, name) != getattr(first.info, name):
                    raise DataError(
                        f"{dataset.prefix}{MANIFEST} has another {name} than {first.prefix}{MANIFEST}: {remedy}"
                    )
        for dataset in datasets[1:]:
            kinds = [one.info.tokenizer_kind for one in (dataset, datasets[0])]
            if kinds[0] != kinds[1]:
                raise DataError(
                    f"{dataset.prefix}{MANIFEST} has the tokenizer mode {kinds[0]!r} and "
                    f"{datasets[0].prefix}{MANIFEST} {kinds[1]!r}, which give other ids for the same text: {SAME_KIND}"
                )
        self._datasets: list[AnyDataset] = list(datasets)
        self._sample_bounds = np.cumsum([len(dataset) for dataset in datasets])
        self._image_bounds = np.cumsum([dataset.info.num_images for dataset in datasets])
        self.info = dataclasses.replace(
            with_images[0].info, max_pixels=max(dataset.info.max_pixels for dataset in with_images)
        )
        self.samples = JoinedSamples(datasets, np.append(0, self._image_bounds[:-1]))

    def __len__(self) -> int:
        return int(self._sample_bounds[-1])

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of the samples at `indices` once images are expanded: int64, of the shape of `indices`."""
        return self.samples[indices]["length"].astype(np.int64)

    def tile_counts(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images, tile by tile, of each sample (see `IndexedVisionDataset.tile_counts`)."""
        return self._of_samples(indices, lambda dataset, rows: dataset.tile_counts(rows))

    def _of_samples(
        self, indices: NDArray[np.int64], count: Callable[[AnyDataset, NDArray[np.int64]], NDArray[np.int64]]
    ) -> NDArray[np.int64]:
        """A number of each sample: int64 [n]; `count` gives those of rows of one dataset."""
        which = np.searchsorted(self._sample_bounds, indices, side="right")
        counts = np.empty(len(indices), dtype=np.int64)
        for number in np.unique(which):
            dataset, here = self._datasets[number], which == number
            counts[here] = count(dataset, indices[here] - (self._sample_bounds[number] - len(dataset)))
        return counts

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and labels of a sample (see `IndexedVisionDataset.text`)."""
        dataset, row = self._locate(self._sample_bounds, index)
        return dataset.text(row)

    def visual_labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of images to draw of each sample (see `IndexedVisionDataset.visual_labels`)."""
        return self._of_samples(indices, lambda dataset, rows: dataset.visual_labels(rows))

    def drawn(self, image: int) -> bool:
        """Is an image to be drawn (see `IndexedVisionDataset.drawn`)?"""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.drawn(row)

    @property
    def code_depth(self) -> int:
        """Codes of a position of an image; 0 where codes are not read."""
        return self._datasets[0].code_depth

    def codes(self, image: int) -> NDArray[np.uint16]:
        """Codes of an image (see `IndexedVisionDataset.codes`)."""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.codes(row)

    def image_bytes(self, image: int) -> bytes:
        """The file of an image (see `IndexedVisionDataset.image_bytes`)."""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.image_bytes(row)

    def stored_pixels(self, image: int) -> dict[str, NDArray[np.uint8]] | None:
        """An image as it was decoded when its dataset was made (see `IndexedVisionDataset.stored_pixels`)."""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.stored_pixels(row)

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages."""
        dataset, row = self._locate(self._sample_bounds, index)
        return dataset.sample_name(row)

    def image_name(self, image: int) -> str:
        """Name of an image in messages."""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.image_name(row)

    @property
    def planner(self) -> ImagePlanner:
        """Gives image plans: that of the first dataset with images, if there is one."""
        return next((one for one in self._datasets if one.info.num_images), self._datasets[0]).planner

    def image_plan(self, image: int) -> ImagePlan:
        """The plan of an image (see `IndexedVisionDataset.image_plan`)."""
        dataset, row = self._locate(self._image_bounds, image)
        return dataset.image_plan(row)

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Ask the operating system to read the images of these samples ahead."""
        which = np.searchsorted(self._sample_bounds, indices, side="right")
        for number in np.unique(which):
            dataset = self._datasets[number]
            dataset.will_need(indices[which == number] - (self._sample_bounds[number] - len(dataset)))

    def _locate(self, bounds: NDArray[np.int64], index: int) -> tuple[AnyDataset, int]:
        if not 0 <= index < bounds[-1]:
            raise IndexError(f"index {index} is out of range for {bounds[-1]} rows")
        number, row = part_and_row(bounds, index)
        return self._datasets[number], row


def part_and_row(bounds: NDArray[np.int64], index: int) -> tuple[int, int]:
    """Of rows that are counted through several parts: the part that has row `index`, and the row in it.

    Args:
        bounds: rows up to the end of each part.
        index: below the last of them.
    """
    number = int(np.searchsorted(bounds, index, side="right"))
    return number, int(index) - (int(bounds[number - 1]) if number else 0)


class MergedDataset(WithOpenedCodes, JoinedDataset):
    """A merged dataset: its manifest names other datasets, which hold its samples in this order.

    Args:
        prefix: of its manifest.
        mmap_bin_files: see `IndexedVisionDataset`.

    Attributes:
        prefix: as given.
        info: its manifest.

    Raises:
        DataError: a part cannot be opened, or was changed since it was merged.
    """

    def __init__(self, prefix: str | Path, *, mmap_bin_files: bool = True) -> None:
        self.prefix = str(prefix)
        info = read_info(self.prefix)
        parts = []
        for part in info.datasets:
            path = os.path.normpath(Path(self.prefix).parent / part["prefix"])
            parts.append(IndexedVisionDataset(path, mmap_bin_files=mmap_bin_files))
            if parts[-1].info.content_sha256 != part["content_sha256"]:
                raise DataError(
                    f"{path}{MANIFEST} is another dataset than the one that {self.prefix}{MANIFEST} was made of: "
                    "run tools/merge_datasets.py again"
                )
        super().__init__(parts)
        self.info = info

    @property
    def parts(self) -> list[AnyDataset]:
        """The merged datasets, in the order of the manifest."""
        return list(self._datasets)

    def use_image_settings(self, family: str, settings: ImageSettings) -> None:
        """See `IndexedVisionDataset.use_image_settings`."""
        for dataset in self._datasets:
            dataset.use_image_settings(family, settings)

    def check_compatible(self, **needs: Any) -> None:
        """Check that a run can train on every part (see `IndexedVisionDataset.check_compatible`)."""
        for dataset in self._datasets:
            dataset.check_compatible(**needs)

    @property
    def sample_files(self) -> list[Path]:
        """The files with the records of its samples."""
        return [path for dataset in self._datasets for path in dataset.sample_files]


AnyDataset = IndexedVisionDataset | MergedDataset
"""A dataset of its own files, or a merged one."""


def open_dataset(prefix: str | Path, *, mmap_bin_files: bool = True) -> AnyDataset:
    """Open the dataset at a prefix, merged or not.

    Args:
        prefix: the --output-prefix it was written to.
        mmap_bin_files: see `IndexedVisionDataset`.

    Raises:
        DataError: a file is missing, damaged or of another version.
    """
    kind = MergedDataset if read_info(str(prefix)).datasets else IndexedVisionDataset
    return kind(prefix, mmap_bin_files=mmap_bin_files)
