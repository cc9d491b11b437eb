"""Configuration files of EVE's folders: what is read of them, and what exports hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.hf_format import JSONFiles
from megatron_eve.models.rope_scaling import scaling_field

# CLIP's, which EVE's processors take over.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_AUTO_MAP = {
    "AutoConfig": "configuration_eve.EVEConfig",
    "AutoModel": "modeling_eve.EVEModel",
    "AutoModelForCausalLM": "modeling_eve.EVELlamaForCausalLM",
    "AutoModelForImageTextToText": "modeling_eve.EVELlamaForCausalLM",
    "AutoImageProcessor": "image_processing_eve.EVEImageProcessor",
    "AutoProcessor": "processing_eve.EVEProcessor",
}
PROCESSOR_CLASS = "EVEProcessor"
# Without a length of its own, transformers ends an answer after 20 tokens. As tools/chat.py does.
_GENERATION = {"do_sample": False, "max_new_tokens": 256}
# Of the image processor; the published file has more, for a canvas that is not made here.
_IMAGE_FIELDS = (
    "image_size", "image_size_clip", "patch_stride", "patch_stride_clip", "conv_stride", "image_mean", "image_std",
)  # fmt: skip


def image_size_of(fields: Mapping[str, Any]) -> int | None:
    """Pixels of the long side, by the name of the published processor in config.json; None if it does not say."""
    found = re.search(r"-(\d+)$", str(fields.get("mm_vision_tower") or ""))
    return int(found[1]) if found else None


def teacher_size_of(folder: Path, image_size: int) -> int:
    """`--teacher-size` by a folder's image processor; where it does not say, the published one if it fits."""
    # transformers 5 saves it as a part of the processor; the hub's folders have none, other models' another.
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        try:
            fields = json.loads((folder / name).read_text(encoding="utf-8"))
            return int((fields[part] if part else fields)["image_size_clip"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(336, image_size // 2)


def published_config(
    model: ModelConfig, vision: EVEConfig, dtype: str, ids: Mapping[str, int], teacher: bool
) -> dict[str, Any]:
    """The config.json of a published EVE (BAAI/EVE-7B-v1.0) with these sizes.

    Args:
        model: sizes of the decoder.
        vision: EVE's settings.
        dtype: of the weights, such as "bfloat16".
        ids: of control tokens.
        teacher: the folder holds the teacher and the aligning layer, which the public code loads for training.
    """
    # Of today's language models: the public code knows the usual base alone, and no biases.
    rope = {} if model.rotary_base == ModelConfig.rotary_base else {"rope_theta": model.rotary_base}
    bias = {"qkv_bias": True} if model.add_qkv_bias else {}
    return {
        "architectures": ["EVELlamaForCausalLM"],
        **ids,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mm_hidden_size": vision.patch_embedding_size,
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"openai/eve-patch14-anypixel-{vision.image_size}",
        "mm_vision_tower_clip": "openai/clip-vit-large-patch14-336",
        "model_type": "eve",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "pretraining_tp": 1,
        **bias,
        "requires_cliploss": teacher,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": scaling_field(model),
        **rope,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vision_tower_lr": None,
        "vocab_size": model.vocab_size,
    }


def published_preprocessor(vision: EVEConfig) -> dict[str, Any]:
    """The preprocessor_config.json that the published code asks for, and that the hub lacks."""
    size = vision.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
        "image_size": size,
        "image_size_clip": vision.teacher_size,
        "patch_stride": 14,
        "patch_stride_clip": 14,
        "conv_stride": 2,
    }


def transformers_files(
    model: ModelConfig, vision: EVEConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
) -> JSONFiles:
    """See `HFFormat.transformers_files`."""
    config = {
        **published_config(model, vision, dtype, ids, teacher=False),
        "auto_map": {
            name: _AUTO_MAP[name] for name in _AUTO_MAP if name.startswith(("AutoConfig", "AutoModel"))
        },
        "image_token_index": image_token_id,
    }
    del config["transformers_version"]
    config["dtype"] = config.pop("torch_dtype")  # as transformers calls it since 4.56
    published = published_preprocessor(vision)
    image_processor: dict[str, Any] = {name: published[name] for name in _IMAGE_FIELDS}
    image_processor["image_processor_type"] = "EVEImageProcessor"
    image_processor["auto_map"] = {name: _AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}
    return {
        "config.json": config,
        "generation_config.json": {**ids, **_GENERATION},
        "preprocessor_config.json": image_processor,
        "processor_config.json": {
            "processor_class": PROCESSOR_CLASS,
            "auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]},
        },
    }


def code_files() -> list[Path]:
    """The modules that the folder's `auto_map` names, and those that they import."""
    return sorted(
        Path(__file__).with_name(f"{name}.py") for name in {p.partition(".")[0] for p in _AUTO_MAP.values()}
    )
