"""VILA for transformers: its own LLaVA for mlp2x_gelu, without any code of ours, and `modeling_vila.py` for the others.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import JSONFiles
from megatron_eve.models.language_config import language_config
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.geometry import projector_rows
from megatron_eve.models.vila.hf.published import PIXELS, tower_config

# Without a length of its own, transformers ends an answer after 20 tokens. As tools/chat.py does.
_GENERATION = {"do_sample": False, "max_new_tokens": 256}
# Rows of the tower that the projector gets: all but the class token, or all.
_STRATEGIES = {"clip": "default", "siglip": "full"}
_BICUBIC = 3


def rows_of(model: ModelConfig, image_token_id: int) -> int:
    """Rows of the embedding and of the output layer: LLaVA looks `<image>` up like any token, and then replaces it."""
    return max(model.vocab_size, image_token_id + 1)


def is_llava(vision: VILAConfig) -> bool:
    """Does transformers' own LLaVA compute a model of these settings?"""
    return vision.projector_type == "mlp2x_gelu"


def code_files(vision: VILAConfig) -> list[Path]:
    """See `HFFormat.code`."""
    names = () if is_llava(vision) else ("configuration_vila.py", "modeling_vila.py")
    return [Path(__file__).with_name(name) for name in names]


def transformers_files(
    model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
) -> JSONFiles:
    """See `HFFormat.transformers_files`."""
    files = _llava_files(model, vision, dtype, ids, image_token_id)
    if is_llava(vision):
        return files
    files["config.json"] |= {
        "architectures": ["VILAForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_vila.VILAConfig",
            "AutoModelForImageTextToText": "modeling_vila.VILAForConditionalGeneration",
        },
        "mm_projector_type": vision.projector_type,
        "model_type": "megatron_vila",
        "projector_token_order": vision.projector_token_order,
    }
    if vision.projector_type == "qformer":
        files["config.json"]["qformer_num_queries"] = vision.qformer_num_queries
    # LLaVA's processor counts one row for a picture that is one patch, and so many more.
    files["processor_config.json"] |= {
        "patch_size": vision.image_size,
        "num_additional_image_tokens": _rows_of_picture(vision) - 1,
        "vision_feature_select_strategy": "full",
    }
    return files


def _rows_of_picture(vision: VILAConfig) -> int:
    return projector_rows(vision.projector_type, vision.grid, vision.qformer_num_queries)


def _llava_files(
    model: ModelConfig, vision: VILAConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
) -> JSONFiles:
    """Of transformers' own LLaVA."""
    text, tower = language_config(model, dtype, ids), tower_config(vision, dtype)
    for section in (text, tower):
        section.pop("torch_dtype")
    text["vocab_size"] = rows_of(model, image_token_id)
    strategy = _STRATEGIES[vision.vision_model_type]
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": dtype,
        "image_seq_length": _rows_of_picture(vision),
        "image_token_index": image_token_id,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": tower,
        "vision_feature_layer": vision.vision_select_layer,
        "vision_feature_select_strategy": strategy,
    }
    # The row of `<image>` is zero, so its score may be the highest.
    generation = {**ids, **_GENERATION, "suppress_tokens": [image_token_id]}
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.vision_patch_size,
        "num_additional_image_tokens": 1 if strategy == "default" else 0,
        "vision_feature_select_strategy": strategy,
    }
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": _image_processor(vision),
        "processor_config.json": processor,
    }


def _image_processor(vision: VILAConfig) -> dict[str, Any]:
    """A processor that fits a picture into the tower's square as training did."""
    mean, deviation = PIXELS[vision.vision_model_type]
    size = vision.image_size
    square = {"height": size, "width": size}
    stretch = vision.image_fit == "stretch"
    return {
        # LLaVA's makes the picture a square of its mean colour first.
        "image_processor_type": "LlavaImageProcessor" if vision.image_fit == "pad" else "CLIPImageProcessor",
        **({"do_pad": True} if vision.image_fit == "pad" else {}),
        "processor_class": "LlavaProcessor",
        "crop_size": square,
        "do_center_crop": not stretch,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": deviation,
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": square if stretch else {"shortest_edge": size},
    }
