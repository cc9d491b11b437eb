"""The vectors of towers, against transformers with its own preprocessing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from megatron_eve.config import ConfigError
from megatron_eve.curation.image_tower import read_preprocessing
from megatron_eve.curation.stages.features import tower_sha256
from tests.curation.photo_kinds import variant
from tests.curation.toy_towers import (
    SIDE,
    clip_model,
    open_tower,
    random_tower,
    save_tower,
    views,
    vision_sizes,
)

FILES = [variant("astronaut", 0), variant("retina", 1), variant("page", 2)]
IMAGES = [Image.open(io.BytesIO(file)).convert("RGB") for file in FILES]


def processed(folder: Path) -> torch.Tensor:
    """Pixel values as transformers makes them."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    values: torch.Tensor = processor(IMAGES, return_tensors="pt")["pixel_values"]
    return values


def check(folder: Path, expected: torch.Tensor) -> None:
    tower = open_tower(folder)
    found = tower(views(FILES, tower, "pillow"))
    assert found.shape == expected.shape and tower.width == expected.shape[1]
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=2e-5, rtol=0)


@torch.no_grad()
def test_clip_gives_its_projected_image_features(tmp_path: Path) -> None:
    model = clip_model(24)
    folder = save_tower(tmp_path, model, image_processor_type="CLIPImageProcessor")
    outputs = model.vision_model(pixel_values=processed(folder))
    check(folder, model.visual_projection(outputs.pooler_output))


@torch.no_grad()
def test_siglip_gives_the_output_of_its_pooling_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision_sizes())).eval()
    size = {"height": SIDE, "width": SIDE}
    folder = save_tower(
        tmp_path,
        model,
        size=size,
        do_center_crop=False,
        image_processor_type="SiglipImageProcessor",
        resample=3,
    )
    check(folder, model(pixel_values=processed(folder)).pooler_output)


@torch.no_grad()
def test_dinov2_gives_its_class_token_of_the_middle_of_a_larger_square(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {key: value for key, value in vision_sizes().items() if key != "intermediate_size"}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    folder = save_tower(
        tmp_path, model, size={"shortest_edge": 72}, image_processor_type="BitImageProcessor", resample=3
    )
    check(folder, model(pixel_values=processed(folder)).pooler_output)


def test_a_tower_without_a_pooling_head_is_refused(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(**vision_sizes(), vision_use_head=False)
    folder = save_tower(tmp_path, transformers.SiglipVisionModel(config))
    with pytest.raises(ConfigError, match="gives no pooled vector"):
        open_tower(folder)


def test_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = save_tower(tmp_path, clip_model(8), crop_size=32, size=32)
    with pytest.raises(ConfigError, match="32 x 32 pixels"):
        open_tower(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"height": 64, "width": 32}},
        {"size": {"longest_edge": 64}},
        {"crop_size": 128},
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": None},
    ],
)
def test_preprocessing_that_gives_no_square_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = save_tower(tmp_path, clip_model(8), **fields)
    with pytest.raises(ConfigError, match=r"preprocessor_config.json does not say"):
        read_preprocessing(folder, SIDE)


def test_without_preprocessor_config_it_is_clips(tmp_path: Path) -> None:
    found = read_preprocessing(tmp_path, 336)
    assert (found.side, found.view.fit, found.view.width) == (336, "crop", 336)
    assert found.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)


def test_the_digest_is_of_the_weights(tmp_path: Path) -> None:
    one, other = random_tower(tmp_path / "one"), random_tower(tmp_path / "other", seed=1)
    assert tower_sha256(one) == tower_sha256(random_tower(tmp_path / "again")) != tower_sha256(other)
    with pytest.raises(ConfigError, match=r"no config.json there"):
        tower_sha256(tmp_path)
