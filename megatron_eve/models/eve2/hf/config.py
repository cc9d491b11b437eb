"""config.json of EVE v2's folders, and the settings in it. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.eve2.config import EVE2Config
from megatron_eve.models.hf_format import JSONFiles, Stated
from megatron_eve.models.language_config import language_config
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD

MODEL_TYPE = "eve-qwen2"
EXPERT_PARTS = "layernorm-self_attn-mlp"
"""`moe_part` of the published model: norms, attention and MLP all have experts."""
_TOWER = "mm_vision_tower"
_SIDE = re.compile(r"(?:res|mini)(\d+)")
PREPROCESSOR = "preprocessor_config.json"


def has_experts(fields: Mapping[str, Any]) -> bool:
    """Does a model of this config.json have experts? That of stage 0 has none."""
    return bool(fields.get("add_moe"))


def field_errors(fields: Mapping[str, Any]) -> Iterator[str]:
    """See `HFFormat.check_fields`."""
    part = fields.get("moe_part")
    if has_experts(fields) and part != EXPERT_PARTS:
        yield (
            f"moe_part is {part!r}, and experts are of all parts here ({EXPERT_PARTS!r}), as in the published model; "
            "take a model with these"
        )


def stated(fields: Mapping[str, Any], folder: Path) -> Iterator[Stated]:
    """See `HFFormat.stated`: the width of the patch embedding, and the size of pictures.

    The size stands in preprocessor_config.json; the published folder lacks that file, and names in `mm_vision_tower` a
    folder of the code that is called after it.
    """
    if "mm_hidden_size" in fields:
        yield Stated("patch_embedding_size", fields["mm_hidden_size"], "mm_hidden_size")
    path = folder / PREPROCESSOR
    try:
        side = json.loads(path.read_text(encoding="utf-8"))["max_size"]
    except (OSError, ValueError, KeyError, TypeError):
        found = _SIDE.search(str(fields.get(_TOWER, "")))
        side = int(found[1]) if found else None
    if isinstance(side, int) and side > 0:
        yield Stated("max_image_side", side, "max_size")


def published_files(model: ModelConfig, vision: EVE2Config, dtype: str, ids: Mapping[str, int]) -> JSONFiles:
    """config.json and preprocessor_config.json in the published layout."""
    experts = model.modality_experts
    config = {
        **language_config(model, dtype, ids),
        "architectures": ["EVEQwen2ForCausalLM"],
        "model_type": MODEL_TYPE,
        "add_moe": experts,
        "moe_part": EXPERT_PARTS if experts else None,
        "mm_hidden_size": vision.patch_embedding_size,
        # The published code opens the processor from this folder, beside its own files.
        _TOWER: f"openai/eve-anyratio-res{vision.max_image_side}-patch16",
        "tune_VE": True,
        "tune_MOE": experts,
        "tune_LLM": True,
    }
    return {"config.json": config, PREPROCESSOR: preprocessor(vision)}


def preprocessor(vision: EVE2Config) -> dict[str, Any]:
    """preprocessor_config.json, with the published names."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
        "max_size": vision.max_image_side,
        "patch_stride": 16,
        "dense_stride": 2,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
