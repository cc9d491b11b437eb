"""Several datasets as one, against each by itself; and what does not go together."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.joined import JoinedDataset
from megatron_eve.data.format.manifest import DatasetSettings
from megatron_eve.data.sampling import cache
from megatron_eve.data.sampling.cache import cached_array
from tests.data.helpers import MINI_SETTINGS, encoded, picture

SETTINGS = replace(MINI_SETTINGS, max_pixels=1000)


def write(
    prefix: Path, image_counts: list[int], settings: DatasetSettings = SETTINGS
) -> IndexedVisionDataset:
    """Samples with so many pictures each, all of another size."""
    with DatasetWriter(prefix, settings) as writer:
        for number, count in enumerate(image_counts):
            images = []
            for i in range(count):
                width, height = 20 + number, 10 + 3 * i
                images.append(StoredImage(encoded(picture(width, height, seed=number), "PNG"), width, height))
            tokens = [1, *[-200] * count, *range(5, 8 + number)]
            writer.add_sample(tokens, [-100] * (1 + count) + tokens[1 + count :], images)
        writer.finalise()
    return IndexedVisionDataset(prefix)


@pytest.fixture
def datasets(tmp_path: Path) -> list[IndexedVisionDataset]:
    return [
        write(tmp_path / "a", [1, 0, 2]),
        write(tmp_path / "text", [0, 0]),
        write(tmp_path / "b", [0, 3, 1, 1], replace(SETTINGS, max_pixels=2000)),
    ]


def test_each_sample_and_image_is_that_of_its_dataset(datasets: list[IndexedVisionDataset]) -> None:
    joined = JoinedDataset(datasets)
    assert (len(joined), joined.info.max_pixels) == (9, 2000)
    sample = image = 0
    for dataset in datasets:
        for row in range(len(dataset)):
            tokens, labels = joined.text(sample)
            assert (tokens.tolist(), labels.tolist()) == tuple(part.tolist() for part in dataset.text(row))
            ours, theirs = joined.samples[sample], dataset.samples[row]
            assert ours["first_image"] == image + theirs["first_image"]
            for field in ("length", "text_length", "labels", "num_images"):
                assert ours[field] == theirs[field]
            sample += 1
        for row in range(dataset.info.num_images):
            assert joined.image_bytes(image) == dataset.image_bytes(row)
            assert joined.image_plan(image) == dataset.image_plan(row)
            assert joined.image_name(image) == f"image {row} of {dataset.prefix}"
            image += 1
    everyone = joined.samples[np.arange(9).reshape(3, 3)]
    assert everyone.shape == (3, 3)
    assert (everyone.ravel() == np.array([joined.samples[i] for i in range(9)])).all()
    assert joined.lengths(np.array([8, 0])).tolist() == [
        joined.samples[8]["length"],
        joined.samples[0]["length"],
    ]
    joined.will_need(np.array([8, 0, 3, 5]))
    for wrong in (-1, 9):
        with pytest.raises(IndexError):
            joined.text(wrong)
        with pytest.raises(IndexError):
            joined.image_bytes(wrong)


def test_a_batch_over_datasets_has_the_pixels_of_each(datasets: list[IndexedVisionDataset]) -> None:
    options: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1, "views": ["patches"]}
    joined = build_batch(JoinedDataset(datasets), [7, 1, 2], **options).pixels["patches"]
    single = [
        build_batch(datasets[2], [2], **options).pixels["patches"],
        build_batch(datasets[0], [2], **options).pixels["patches"],
    ]
    assert joined is not None
    assert joined.equal(torch.cat(single))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"apply_exif": True}, "other_dataset.json has another apply_exif.*ignore-exif-orientation"),
        ({"tokenizer_sha256": "cd" * 32}, "another tokenizer_sha256.*--tokenizer-model"),
    ],
)
def test_datasets_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    pair = [write(tmp_path / "a", [1]), write(tmp_path / "other", [1], replace(SETTINGS, **change))]
    with pytest.raises(DataError, match=message):
        JoinedDataset(pair)


def test_text_alone_goes_with_any_treatment_of_images(tmp_path: Path) -> None:
    """Made without --ignore-exif-orientation, beside images made with it; the images' settings are the run's."""
    text = write(tmp_path / "text", [0, 0], replace(SETTINGS, apply_exif=True, max_pixels=5000))
    images = write(tmp_path / "images", [1, 2])
    for datasets in ([text, images], [images, text]):
        info = JoinedDataset(datasets).info
        assert (info.apply_exif, info.max_pixels) == (False, SETTINGS.max_pixels)
    assert JoinedDataset([text, text]).info.apply_exif is True


def test_a_cached_array_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def build() -> np.ndarray:
        calls.append(1)
        return np.arange(5)

    folder = tmp_path / "new" / "cache"
    for _ in range(2):
        assert cached_array(str(folder), "five", build).tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 1
    assert [path.name for path in folder.iterdir()] == ["five.npy"]
    assert cached_array(None, "five", build).tolist() == [0, 1, 2, 3, 4]
    assert len(calls) == 2


def test_a_cut_cache_file_is_made_again(tmp_path: Path) -> None:
    cached_array(str(tmp_path), "five", lambda: np.arange(5))
    path = tmp_path / "five.npy"
    for size in (path.stat().st_size - 8, 10, 0):
        os.truncate(path, size)
        assert cached_array(str(tmp_path), "five", lambda: np.arange(5)).tolist() == [0, 1, 2, 3, 4]


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    with pytest.raises(OSError, match=rf"--data-cache-path {tmp_path}.*No space left"):
        cached_array(str(tmp_path), "five", lambda: np.arange(5))
    assert not list(tmp_path.iterdir())


def test_a_file_that_others_have_mapped_is_not_replaced(tmp_path: Path) -> None:
    """Another process names its file while this one computes: this one takes that."""

    def build() -> np.ndarray:
        cached_array(str(tmp_path), "five", lambda: np.arange(5))
        return np.arange(5)

    assert cached_array(str(tmp_path), "five", build).tolist() == [0, 1, 2, 3, 4]
    inode = (tmp_path / "five.npy").stat().st_ino
    assert cached_array(str(tmp_path), "five", build).tolist() == [0, 1, 2, 3, 4]
    assert (tmp_path / "five.npy").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["five.npy"]
