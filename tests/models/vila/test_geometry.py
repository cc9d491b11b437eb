"""What a picture becomes for VILA: rows, and the published pixels."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from megatron_eve.data.images import view_of
from megatron_eve.models.towers.normalisation import NORMALISATION
from megatron_eve.models.vila.config import PRESETS, VILAConfig
from megatron_eve.models.vila.geometry import (
    IMAGE_FLAGS,
    VIEW,
    image_setting_errors,
    image_settings,
    pad_colour,
    planner,
    projector_rows,
)
from tests.golden_dir import find_golden

# Settings of the ways in which the golden pictures were fitted. The processor of SigLIP and a resize before it are one.
WAYS: dict[str, dict[str, Any]] = {
    "clip336_pad": {},
    "clip336_square": {"image_fit": "crop"},
    "siglip384_resize": {"image_size": 384, "image_fit": "stretch", "vision_model_type": "siglip"},
    "siglip384_processor": {"image_size": 384, "image_fit": "stretch", "vision_model_type": "siglip"},
    "vilau256_resize": {
        "image_size": 256,
        "vision_patch_size": 16,
        "image_fit": "stretch",
        "vision_model_type": "siglip",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_pixels_are_the_published_ones(way: str) -> None:
    """Six pictures, the longest 1000 : 1, every byte, and 1 in 256 of the values that the tower sees."""
    folder = find_golden("vila/vila_preprocess")
    cases = json.loads((folder / "meta.json").read_text())["cases"]
    samples = load_file(folder / "samples.safetensors")
    names = [name for name in cases if name.endswith(f".{way}")]
    assert len(names) == 6
    for name in names:
        image = Image.open(folder / "raw" / f"{name.split('.')[0]}.png")
        view = planner(WAYS[way])(*image.size).views[VIEW]
        pixels = view_of(image, view).transpose(2, 0, 1)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == cases[name]["sha256_u8_chw"], name
        assert list(pixels.shape) == cases[name]["shape"]
        (sample,) = (value for key, value in samples.items() if key.startswith(name))
        tower = WAYS[way].get("vision_model_type", "clip")
        mean, deviation = (np.array(values)[:, None, None] for values in NORMALISATION[tower])
        values = (pixels / 255 - mean) / deviation
        assert abs(values[:, 5::16, 5::16] - sample).max() < 1e-5, name


@pytest.mark.parametrize(
    ("projector_type", "grid", "rows"),
    [
        ("linear", 24, 576), ("mlp2x_gelu", 24, 576), ("mlp3x_gelu", 7, 49), ("mlp_downsample", 27, 196),
        ("mlp_downsample", 4, 4), ("mlp_downsample_2x2_fix", 5, 9), ("mlp_downsample_3x3_fix", 32, 121),
        ("mlp_downsample_3x3_fix", 7, 9), ("qformer", 24, 64),
    ],
)  # fmt: skip
def test_rows_of_a_picture(projector_type: str, grid: int, rows: int) -> None:
    assert projector_rows(projector_type, grid, 64) == rows


def test_the_defaults_are_the_published_ones() -> None:
    """A side that is no whole number of patches: SigLIP's 384 pixels are 27 patches of 14, and a rest of 6."""
    published = image_settings(PRESETS["vila_7b"].vision)
    assert {name: IMAGE_FLAGS[name].default for name in published} == published
    assert planner({})(640, 480) == planner(published)(3, 4000)
    plan = planner(image_settings(PRESETS["vila15_8b"].vision))(640, 480)
    assert (plan.rows, plan.grid, plan.views[VIEW].shape) == (196, (14, 14), (384, 384, 3))
    assert [pad_colour(tower) for tower in ("clip", "siglip")] == [(122, 116, 104), (127, 127, 127)]


def test_queries_count_only_where_there_are_some() -> None:
    assert "qformer_num_queries" not in image_settings(VILAConfig())
    settings = image_settings(VILAConfig(projector_type="qformer", qformer_num_queries=5))
    assert planner(settings)(9, 9)[:2] == (5, (1, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_patch_size": 0}, "--vision-patch-size 0: use 1 or more"),
        ({"image_size": 13}, r"--image-size 13: is smaller than a patch .*\(--vision-patch-size 14\)"),
        ({"qformer_num_queries": 0}, "--qformer-num-queries 0: use 1 or more"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, int], message: str) -> None:
    defaults = {name: flag.default for name, flag in IMAGE_FLAGS.items()}
    assert not list(image_setting_errors(defaults))
    (error,) = image_setting_errors(defaults | change)
    with pytest.raises(ValueError, match=message) as caught:
        planner(change)
    assert str(caught.value) == error
    with pytest.raises(ValueError, match="0 x 5 pixels has no area: leave it out"):
        planner({})(0, 5)
