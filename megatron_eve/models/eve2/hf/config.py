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
_PROCESSOR = "processor_config.json"
_AUTO_MAP = {
    "AutoConfig": "configuration_eve2.EVE2Config",
    "AutoModel": "modeling_eve2.EVE2Model",
    "AutoModelForCausalLM": "modeling_eve2.EVEQwen2ForCausalLM",
    "AutoModelForImageTextToText": "modeling_eve2.EVEQwen2ForCausalLM",
}
_PROCESSORS = {
    "AutoImageProcessor": "image_processing_eve2.EVE2ImageProcessor",
    "AutoProcessor": "processing_eve2.EVE2Processor",
}
_CODE = (
    "configuration_eve2.py",
    "image_processing_eve2.py",
    "modeling_eve2.py",
    "modeling_eve2_layers.py",
    "processing_eve2.py",
)
# Without a length of its own, transformers ends an answer after 20 tokens. As tools/chat.py does.
_GENERATION = {"do_sample": False, "max_new_tokens": 256}
# Of the image processor; the published file has more, for steps that are not made here.
_IMAGE_FIELDS = ("max_size", "patch_stride", "dense_stride", "image_mean", "image_std")


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
    side = _max_size(folder)
    if side is None and (found := _SIDE.search(str(fields.get(_TOWER, "")))):
        side = int(found[1])
    if isinstance(side, int) and side > 0:
        yield Stated("max_image_side", side, "max_size")


def _max_size(folder: Path) -> Any:
    """`max_size` of a folder's image processor; None where it does not say."""
    # transformers 5 saves the image processor as a part of the processor.
    for name, part in ((PREPROCESSOR, None), (_PROCESSOR, "image_processor")):
        try:
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            return (fields[part] if part else fields)["max_size"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


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


def transformers_files(
    model: ModelConfig, vision: EVE2Config, dtype: str, ids: Mapping[str, int], image_token_id: int
) -> JSONFiles:
    """See `HFFormat.transformers_files`: pictures get their size by the published rule of evaluation."""
    published = published_files(model, vision, dtype, ids)
    config = {**published["config.json"], "auto_map": _AUTO_MAP, "image_token_index": image_token_id}
    config["dtype"] = config.pop("torch_dtype")  # as transformers calls it since 4.56
    return {
        "config.json": config,
        "generation_config.json": {**ids, **_GENERATION},
        PREPROCESSOR: {
            **{name: published[PREPROCESSOR][name] for name in _IMAGE_FIELDS},
            "image_resize": "scale",
            "image_processor_type": "EVE2ImageProcessor",
            "auto_map": _PROCESSORS,
        },
        _PROCESSOR: {
            "processor_class": "EVE2Processor",
            "auto_map": {"AutoProcessor": _PROCESSORS["AutoProcessor"]},
        },
    }


def code_files() -> list[Path]:
    """The modules that the folder's `auto_map` names, and those that they import."""
    return [Path(__file__).with_name(name) for name in _CODE]
