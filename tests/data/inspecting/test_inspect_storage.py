"""Looking at datasets whose images are stored as JPEG files at the model's size, or as pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.data.images.patches import cut_patches, uncut_patches
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset
from megatron_eve.data.inspecting.inspection import write_inspection
from tests.data.helpers import MakeConfig, opened, picture, planner, run, turns


def test_joining_patches_undoes_cutting_them() -> None:
    pixels = np.asarray(picture(84, 56))
    assert np.array_equal(uncut_patches(cut_patches(pixels, 14, 2), 84, 56, 14, 2), pixels)


@pytest.mark.parametrize("storage", ["jpeg", "pixels"])
def test_a_look_and_a_check(make_config: MakeConfig, tmp_path: Path, storage: str) -> None:
    picture(1600, 900).save(tmp_path / "photos" / "large.jpg")
    row = {"images": ["large.jpg", "ok.jpg"], "conversations": turns("<image><image>", "Two.")}
    config = make_config([row], template="vicuna_v1", image_storage=storage, workers=1)
    run(config)
    dataset = opened(config)
    tally = CheckCounts()
    assert list(check_dataset(dataset, tally, workers=1, advance=lambda num_bytes: None)) == []
    assert tally.num_bytes == dataset.info.text_bytes + dataset.info.stored_bytes
    write_inspection(dataset, "set", tmp_path / "look", [0], None)
    assert f"of images ({storage})" in (tmp_path / "look" / "index.html").read_text(encoding="utf-8")
    drawn = np.asarray(Image.open(tmp_path / "look" / "row_0.png"))[84:250, 16:316].astype(int)
    view = planner(**config.all_image_settings)(1600, 900).views["patches"]
    expected = picture(1600, 900).resize((300, 300 * view.height // view.width))
    assert np.abs(drawn - np.asarray(expected)[:166]).mean() < 3


@pytest.mark.parametrize("storage", ["jpeg", "pixels"])
def test_changed_bytes_are_found(make_config: MakeConfig, storage: str) -> None:
    row = {"image": "ok.jpg", "conversations": turns("<image>", "One.")}
    config = make_config([row], template="vicuna_v1", image_storage=storage, workers=1)
    run(config)
    path = Path(f"{config.output_prefix}_{'pixels' if storage == 'pixels' else 'image'}.bin")
    content = bytearray(path.read_bytes())
    content[0] ^= 0xFF
    path.write_bytes(content)
    damages = list(check_dataset(opened(config), CheckCounts(), workers=1, advance=lambda num_bytes: None))
    assert damages and any("content_sha256" in str(damage) or "row 0" in str(damage) for damage in damages)
