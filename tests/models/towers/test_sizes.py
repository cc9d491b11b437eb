"""What config.json says of a vision tower, read without transformers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CLIPConfig, CLIPVisionConfig, SiglipConfig, SiglipVisionConfig

from megatron_eve.models.towers.sizes import tower_fields


@pytest.mark.parametrize(
    ("alone", "whole"),
    [(CLIPVisionConfig(), CLIPConfig()), (SiglipVisionConfig(), SiglipConfig())],
    ids=["clip", "siglip"],
)
def test_what_is_left_out_is_as_transformers_has_it(alone: Any, whole: Any) -> None:
    for written, expected in (
        ({"model_type": alone.model_type}, alone),
        ({"model_type": whole.model_type}, whole.vision_config),
        ({"model_type": whole.model_type, "vision_config": {}}, whole.vision_config),
    ):
        fields = tower_fields(written)
        assert fields.pop("model_type") == whole.model_type
        assert len(fields) == 8 and fields == {name: getattr(expected, name) for name in fields}


def test_what_is_said_comes_first() -> None:
    """The vision side's own fields, of a tower alone or of a whole model, whose others are the text side's."""
    alone = tower_fields({"model_type": "clip_vision_model", "hidden_size": 64, "vision_use_head": False})
    assert (alone["hidden_size"], alone["vision_use_head"], alone["patch_size"]) == (64, False, 32)
    whole = {"model_type": "siglip", "hidden_size": 512, "vision_config": {"hidden_size": 64}}
    assert tower_fields(whole)["hidden_size"] == 64


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "model_type is 'None', and a CLIP or a SigLIP tower is known here"),
        ({"model_type": "dinov2"}, "model_type is 'dinov2'"),
        ({"model_type": "clip", "vision_config": 3}, "vision_config is 3, not settings by name"),
    ],
)
def test_another_model(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tower_fields(fields)
