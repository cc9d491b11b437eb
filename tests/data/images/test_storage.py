"""Images stored as JPEG files and as pixels: what a run reads of them, and which rows are left out."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import PackedBatch, build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.images import cut_patches, uncut_patches
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.models.eve.geometry import image_geometry
from tests.data.helpers import (
    ALL_VIEWS,
    MakeConfig,
    caption_row,
    encoded,
    opened,
    picture,
    planner,
    run,
    skipped_rows,
    text_row,
)
from tests.data.images.test_decoders import photo
from tests.data.odd_pictures import ODD

# Of which Pillow warns.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SIZES = {"image_size": 224, "teacher_size": 112}


def rows_of(config: PreprocessConfig) -> PackedBatch:
    """All rows as training reads them."""
    dataset = opened(config)
    return build_batch(dataset, range(len(dataset)), tensor_parallel=1, context_parallel=1, **ALL_VIEWS)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.int() - expected.int()).abs().float().mean())


@pytest.fixture
def rows(make_config: MakeConfig, tmp_path: Path) -> list[dict[str, Any]]:
    """Pictures of all kinds of files, odd and damaged ones among them."""
    photos = tmp_path / "photos"
    files = {f"{n:03}.jpg": encoded(photo(300 + 70 * n, 260, n), "JPEG", quality=92) for n in range(4)}
    files |= {f"odd{n:03}": odd.data for n, odd in enumerate(ODD.values())}
    files |= {"cut.jpg": files["000.jpg"][:3000], "text.jpg": b"no picture", "empty.jpg": b""}
    for name, data in files.items():
        (photos / name).write_bytes(data)
    names: list[object] = [*files, "missing.jpg"]
    rows = [caption_row(number, name, f"Number {number}.") for number, name in enumerate(names)]
    both = caption_row(900, ["cut.jpg", "missing.jpg"])
    both["conversations"][0]["value"] = "<image><image>"
    return [*rows, both]


def test_geometry_of_the_resized_size_is_the_same() -> None:
    sizes = random.Random(0)
    for image_size in (672, 1344):
        for _ in range(20_000):
            geometry = image_geometry(sizes.randint(1, 2000), sizes.randint(1, 2000), image_size)
            assert image_geometry(geometry.width, geometry.height, image_size) == geometry


def test_uncut_patches_is_the_inverse() -> None:
    geometry = image_geometry(300, 170, 224, 112)
    pixels = np.random.default_rng(0).integers(0, 256, (geometry.height, geometry.width, 3), dtype=np.uint8)
    back = uncut_patches(cut_patches(pixels, 14, 2), geometry.width, geometry.height, 14, 2)
    assert (back == pixels).all()


@pytest.mark.parametrize("decoder", ["pillow", "threads", "dali"])
@pytest.mark.parametrize("storage", ["jpeg", "pixels"])
def test_the_same_rows_are_kept_and_their_pictures_are_near(
    make_config: MakeConfig, rows: list[dict[str, Any]], storage: str, decoder: str
) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    files = make_config(rows, **SIZES)
    stored = make_config(
        rows, **SIZES, output_prefix=files.output_prefix + "2", image_storage=storage, image_decoder=decoder
    )
    before, after = run(files), run(stored)
    assert (after.skipped, skipped_rows(stored)) == (before.skipped, skipped_rows(files))
    assert (opened(stored).samples == opened(files).samples).all()
    expected, found = rows_of(files), rows_of(stored)
    for name in ("tokens", "labels", "position_ids", "image_starts", "image_grids", "image_rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert found.damaged == {}
    for name in ("patches", "teacher"):
        far = distance(found.pixels[name], expected.pixels[name])
        assert far == 0 if (storage, decoder) == ("pixels", "pillow") else far < 3
    if storage == "pixels":
        assert not Path(stored.output_prefix + "_image.bin").exists()
        assert after.parts["pixels"]["image_decoder"] == decoder


def test_jpeg_makes_files_smaller_and_enlarges_none(make_config: MakeConfig, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    kept = encoded(photo(200, 150), "JPEG")  # smaller than the model's size
    poor = encoded(picture(600, 450), "JPEG", quality=5)  # fewer bytes than at the model's size
    large = encoded(photo(800, 600), "JPEG", quality=95, exif=b"Exif\0\0")
    for name, data in (("kept", kept), ("poor", poor), ("large", large)):
        (photos / name).write_bytes(data)
    rows = [caption_row(0, name) for name in ("kept", "poor", "large")]
    config = make_config(rows, **SIZES, image_storage="jpeg", image_decoder="pillow", jpeg_quality=95)
    run(config)
    dataset = opened(config)
    assert dataset.image_bytes(0) == kept and dataset.image_bytes(1) == poor
    geometry = image_geometry(800, 600, 224, 112)
    assert len(dataset.image_bytes(2)) < len(large)
    assert dataset.images[2].tolist()[:2] == (geometry.width, geometry.height)
    assert dataset.image_plan(2) == planner()(800, 600)


def test_the_bytes_of_pixels(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a.png").write_bytes(encoded(picture(640, 480), "PNG"))
    config = make_config([caption_row(0, "a.png"), text_row()], template="vicuna_v1", image_storage="pixels")
    info = run(config)
    assert (info.image_bytes, info.parts["pixels"]["bytes"]) == (0, 1_016_064 + 254_016)


def test_workers_store_the_same(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded(photo(500, 300), "JPEG"))
    rows = [caption_row(n, "a.jpg" if n % 3 else "no.jpg", f"Number {n}.") for n in range(40)]
    settings: dict[str, Any] = {**SIZES, "image_storage": "pixels", "image_decoder": "threads"}
    alone = make_config(rows, **settings)
    together = make_config(rows, **settings, workers=2, output_prefix=alone.output_prefix + "2")
    assert run(alone) == run(together)
    for part in ("_pixels.bin", "_images.npy", "_text.bin", "_skipped.jsonl"):
        assert (
            Path(alone.output_prefix + part).read_bytes() == Path(together.output_prefix + part).read_bytes()
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_storage": "webp"}, "--image-storage webp: use encoded or jpeg or pixels"),
        ({"image_decoder": "threads"}, "--image-decoder threads: encoded images are not decoded into"),
        ({"jpeg_quality": 0}, "--jpeg-quality 0: use 1 to 100"),
        ({"jpeg_subsampling": "422"}, "--jpeg-subsampling 422: use 420 or 444"),
        ({"teacher_patch_size": 0}, "--teacher-patch-size 0"),
    ],
)
def test_wrong_settings_are_named(make_config: MakeConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(make_config([caption_row(1, "ok.jpg")], **settings))


def test_dali_that_cannot_be_imported_is_told(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = importlib.import_module

    def fail(name: str, package: str | None = None) -> object:
        if name == "nvidia.dali":
            raise ImportError(f"No module named {name!r}")
        return imported(name, package)

    monkeypatch.setattr(importlib, "import_module", fail)
    config = make_config([caption_row(1, "ok.jpg")], image_storage="jpeg", image_decoder="dali")
    with pytest.raises(DataError, match=r"--image-decoder dali: nvidia\.dali cannot be imported"):
        config.check()
