"""What VILA's published folders hold beside weights and tokenizer: VILA 1.0's, VILA-1.5's and NVILA's. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import JSONFiles
from megatron_eve.models.language_config import language_config
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.hf.config import TOWER_CONFIG
from megatron_eve.models.vila.hf.tower import TOWER_FIELDS, published_name

# Pixels are x / 255, minus the mean, over the deviation.
PIXELS: Mapping[str, tuple[list[float], list[float]]] = {
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
    "siglip": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
}
_BICUBIC = 3
# image_aspect_ratio of the public code.
_ASPECT_RATIOS = {"pad": "pad", "crop": "square", "stretch": "resize", "tiles": "dynamic"}
# Rows that a projector takes of the tower, as the public code calls them: all but the class token, or all.
_FEATURES = {"clip": "patch", "siglip": "cls_patch"}


def tower_config(vision: VILAConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a vision tower."""
    clip = vision.vision_model_type == "clip"
    return {
        "architectures": ["CLIPVisionModel" if clip else "SiglipVisionModel"],
        "attention_dropout": 0.0,
        "model_type": f"{vision.vision_model_type}_vision_model",
        "num_channels": 3,
        **{field: getattr(vision, ours) for field, ours in TOWER_FIELDS.items()},
        "torch_dtype": dtype,
    }


def image_processor(vision: VILAConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a vision tower, as the public code reads it."""
    mean, deviation = PIXELS[vision.vision_model_type]
    size = vision.image_size
    clip = vision.vision_model_type == "clip"
    cropping = {"crop_size": {"height": size, "width": size}, "do_center_crop": True} if clip else {}
    return {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        **cropping,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": deviation,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size} if clip else {"height": size, "width": size},
    }


def _vision_fields(vision: VILAConfig) -> dict[str, Any]:
    return {
        "image_aspect_ratio": _ASPECT_RATIOS[vision.image_fit],
        **({"min_tiles": 1, "max_tiles": vision.max_tiles} if vision.image_fit == "tiles" else {}),
        "mm_hidden_size": vision.vision_hidden_size,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": _FEATURES[vision.vision_model_type],
        "mm_vision_select_layer": vision.vision_select_layer,
    }


def flat_files(model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int]) -> JSONFiles:
    """Of VILA 1.0, whose config.json names the tower by its id on the hub; that of another tower stands beside it."""
    tower = published_name(vision)
    config = {
        **language_config(model, dtype, ids),
        "architectures": ["LlavaLlamaForCausalLM"],
        **_vision_fields(vision),
        "mm_projector_type": vision.projector_type,
        "mm_vision_tower": tower or TOWER_CONFIG,
        "model_type": "llava_llama",
        # Of today's language models: the public code knows no biases.
        **({"qkv_bias": True} if model.add_qkv_bias else {}),
        "tokenizer_model_max_length": model.max_position_embeddings,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
    }
    files = {"config.json": config, "preprocessor_config.json": image_processor(vision)}
    return files if tower else {**files, f"{TOWER_CONFIG}/config.json": tower_config(vision, dtype)}


def part_files(model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int]) -> JSONFiles:
    """Of VILA-1.5; those of NVILA, if the rows of a projector that takes blocks of features lie row by row."""
    language, tower = language_config(model, dtype, ids), tower_config(vision, dtype)
    projector = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": vision.projector_type,
        "model_type": "v2l_projector",
        "torch_dtype": dtype,
    }
    nvila: dict[str, Any] = {}
    if vision.projector_type.startswith("mlp_downsample") and vision.projector_token_order == "row":
        nvila = {"image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}', "ps3": False}
    config = {
        "architectures": ["LlavaLlamaModel"],
        "hidden_size": model.hidden_size,
        "llm_cfg": language,
        "mm_projector_cfg": projector,
        "model_dtype": f"torch.{dtype}",
        "model_type": "llava_llama",
        **nvila,
        "s2": False,
        "tune_language_model": True,
        "tune_mm_projector": True,
        "tune_vision_tower": True,
        "vision_resolution": -1,
        "vision_tower_cfg": tower,
        **_vision_fields(vision),
    }
    return {
        "config.json": config,
        "llm/config.json": language,
        "mm_projector/config.json": projector,
        "vision_tower/config.json": tower,
        "vision_tower/preprocessor_config.json": image_processor(vision),
    }
