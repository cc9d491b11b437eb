"""Datasets of version 1, parts of later versions, and images that are stored as pixels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.joined import JoinedDataset, open_dataset
from megatron_eve.data.format.manifest import IMAGE_PARTS, PIXEL_PARTS
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.images import decode_image, resize, view_of
from megatron_eve.models.registry import FamilyError
from tests.data.helpers import ALL_VIEWS, MINI_SETTINGS, MakeConfig, opened, planner, run, write_dataset
from tests.golden_dir import find_golden


def needs(**sizes: int) -> dict[str, Any]:
    """What a run asks of a dataset that `write_dataset` wrote."""
    return {
        "tokenizer_sha256": "ab" * 32,
        "vocab_size": 384,
        "family": "eve",
        "image_settings": {"image_size": 224, "teacher_size": 112, **sizes},
    }


def change_manifest(prefix: str, **changes: Any) -> None:
    path = Path(prefix + "_dataset.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_as_pixels(prefix: Path, files: IndexedVisionDataset) -> str:
    """The same rows with their images stored as pixels, as Pillow decodes them."""
    settings = {name: getattr(files.info, name) for name in MINI_SETTINGS.__dataclass_fields__}
    settings["image_storage"] = "pixels"
    with DatasetWriter(prefix, type(MINI_SETTINGS)(**settings), {"teacher_patch_size": 14}) as writer:
        for row in range(len(files)):
            tokens, labels = files.text(row)
            sample = files.samples[row]
            first = int(sample["first_image"])
            images = []
            for image in range(first, first + int(sample["num_images"])):
                found = decode_image(files.image_bytes(image), apply_exif=False, max_pixels=1 << 20)
                views = planner()(*found.size).views
                picture = resize(found, views["teacher"].width, views["teacher"].height)
                data = view_of(found, views["patches"]).tobytes() + picture.tobytes()
                images.append(StoredImage(data, *found.size))
            writer.add_sample(tokens, labels, images)
        writer.finalise()
    return str(prefix)


def test_a_dataset_of_version_1_is_read_as_one_made_today(make_config: MakeConfig) -> None:
    folder = find_golden("version1")
    rows = json.loads((folder / "rows.json").read_text())
    config = make_config(
        rows, template="vicuna_v1", image_size=224, teacher_size=112, image_root=str(folder / "photos")
    )
    info = run(config)
    old, new = IndexedVisionDataset(folder / "set"), opened(config)
    assert (old.info.format_version, new.info.format_version) == (1, 4)
    assert (old.info.family, old.info.image_settings) == (new.info.family, new.info.image_settings)
    assert (old.info.image_storage, old.info.parts, old.stored_pixels(0)) == ("encoded", {}, None)
    for name in ("num_samples", "num_tokens", "num_labels", "content_sha256", "skipped"):
        assert getattr(old.info, name) == getattr(info, name), name
    assert (old.samples == new.samples).all() and (old.images == new.images).all()
    assert [old.image_bytes(n) for n in range(3)] == [new.image_bytes(n) for n in range(3)]
    batches = [
        build_batch(dataset, indices, tensor_parallel=1, context_parallel=1, **ALL_VIEWS)
        for dataset, indices in ((old, range(3)), (new, range(3)), (JoinedDataset([old, new]), [0, 4, 2]))
    ]  # fmt: skip
    for batch in batches:
        assert batch.damaged == {}
        for field in dataclasses.fields(batch):
            found, expected = (getattr(one, field.name) for one in (batch, batches[1]))
            if field.name == "pixels":
                found, expected = (
                    torch.cat([v.flatten() for v in some.values()]) for some in (found, expected)
                )
            same = torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
            assert same or field.name == "sample_ids", field.name  # the place in a joined dataset


def test_a_dataset_of_version_3_is_read_as_one_made_today(tmp_path: Path) -> None:
    """It called the image settings sizes, which all of its family's were."""
    path = Path(write_dataset(tmp_path / "set", 3, seed=1) + "_dataset.json")
    new = IndexedVisionDataset(tmp_path / "set")
    manifest = json.loads(path.read_text())
    path.write_text(
        json.dumps({**manifest, "format_version": 3, "image_sizes": manifest.pop("image_settings")})
    )
    old = IndexedVisionDataset(tmp_path / "set")
    assert dataclasses.replace(old.info, format_version=4) == new.info
    assert old.image_plan(0) == new.image_plan(0)


def test_a_part_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "set", 3, seed=1)
    parts = IndexedVisionDataset(prefix).info.parts
    assert list(parts) == ["image"]
    change_manifest(prefix, parts={**parts, "codes": {"dtype": "int32", "bytes": 12, "tokenizer": "some"}})
    assert IndexedVisionDataset(prefix).image_bytes(0)


def test_a_family_that_is_not_here_is_named(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "set", 3, seed=1)
    change_manifest(prefix, family="nowhere")
    with pytest.raises(
        FamilyError, match=r"set_dataset.json: family nowhere: no such family; choose one of eve"
    ):
        IndexedVisionDataset(prefix)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, "does not say which image settings it was made for"),
        ({"image_size": "224"}, "does not say which image settings it was made for"),
        (
            {"image_size": 225, "teacher_size": 112},
            "image size 225 is not a multiple of twice the teacher size",
        ),
    ],
)
def test_image_settings_that_cannot_be_are_refused(tmp_path: Path, sizes: Any, message: str) -> None:
    prefix = write_dataset(tmp_path / "set", 3, seed=1)
    change_manifest(prefix, image_settings=sizes)
    with pytest.raises(DataError, match=message):
        IndexedVisionDataset(prefix)


def test_an_unknown_image_storage_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "set", 3, seed=1)
    change_manifest(prefix, image_storage="codes")
    with pytest.raises(DataError, match="image storage 'codes' and this code reads encoded, jpeg, pixels"):
        IndexedVisionDataset(prefix)


def test_pixels_and_files_give_the_same_batches(tmp_path: Path) -> None:
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 10, seed=1))
    pixels = IndexedVisionDataset(write_as_pixels(tmp_path / "pixels", files))
    assert not any(Path(f"{pixels.prefix}{part}").exists() for part in IMAGE_PARTS[:2])
    assert (pixels.samples == files.samples).all() and pixels.info.content_sha256 != files.info.content_sha256
    pixels.will_need(np.arange(10))
    sizes: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1, **ALL_VIEWS}
    batches = [
        build_batch(dataset, rows, **sizes)
        for dataset, rows in (
            (files, range(10)),
            (pixels, range(10)),
            (JoinedDataset([files, pixels]), [*range(5), *range(15, 20)]),
        )
    ]
    for batch in batches[1:]:
        for name in ("tokens", "labels", "image_starts", "image_grids", "image_rows"):
            assert torch.equal(getattr(batch, name), getattr(batches[0], name)), name
        for name in ("patches", "teacher"):
            assert torch.equal(batch.pixels[name], batches[0].pixels[name]), name
    with pytest.raises(DataError, match="holds pixels and no image files"):
        pixels.image_bytes(0)


def test_pixels_are_bound_to_the_patches_of_the_teacher(tmp_path: Path) -> None:
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 4, seed=1))
    pixels = IndexedVisionDataset(write_as_pixels(tmp_path / "pixels", files))
    pixels.check_compatible(**needs(teacher_patch_size=14))
    pixels.check_compatible(**needs())
    files.check_compatible(**needs(teacher_patch_size=16))
    with pytest.raises(DataError) as caught:
        pixels.check_compatible(**needs(teacher_patch_size=16))
    assert str(caught.value) == (
        f"{pixels.prefix}_dataset.json holds pixels that were made for teacher patch size 14 and the run has 16: "
        "preprocess the data with --teacher-patch-size 16, or with --image-storage encoded, which fits any teacher "
        "patch size"
    )


def test_the_run_says_what_a_dataset_of_files_is_not_made_for(tmp_path: Path) -> None:
    """The teacher's own patches; stored pixels stay as they are."""
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 4, seed=1))
    pixels = IndexedVisionDataset(write_as_pixels(tmp_path / "pixels", files))
    for dataset, square in ((files, 128), (pixels, 112)):
        assert dataset.image_plan(0).views["teacher"].square == 112
        dataset.use_image_settings("eve", {"image_size": 448, "teacher_size": 224, "teacher_patch_size": 16})
        assert dataset.image_plan(0).views["teacher"].square == square
        assert dataset.image_plan(0).rows == planner()(*dataset.images[0].tolist()[:2]).rows


def test_the_parts_of_another_storage_are_removed_with_their_dataset(tmp_path: Path) -> None:
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 4, seed=1))
    prefix = write_dataset(tmp_path / "set", 4, seed=1)
    write_as_pixels(tmp_path / "set", files)
    assert not Path(prefix + "_image.bin").exists()
    for part in PIXEL_PARTS:
        content = Path(prefix + part).read_bytes()
        Path(prefix + part).write_bytes(content[:-1])
        with pytest.raises(DataError, match=part):
            IndexedVisionDataset(prefix)
        Path(prefix + part).write_bytes(content)
    IndexedVisionDataset(prefix)


def test_datasets_of_two_storages_are_merged(tmp_path: Path) -> None:
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 4, seed=1))
    pixels = write_as_pixels(tmp_path / "pixels", files)
    assert merge_datasets(str(tmp_path / "all"), [files.prefix, pixels]).image_storage == "mixed"
    merged = open_dataset(tmp_path / "all")
    assert merged.stored_pixels(0) is None
    assert merged.stored_pixels(files.info.num_images) is not None
    with pytest.raises(DataError, match="teacher patch size 14 and the run has 16"):
        merged.check_compatible(**needs(teacher_patch_size=16))
