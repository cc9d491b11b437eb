"""`config.json` and `preprocessor_config.json` of the model folders that are read and written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config import ConfigError, ModelConfig
from megatron_eve.models.family import ModelSettings, Preset
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.wrong_content import wrong_content

if TYPE_CHECKING:
    from megatron_eve.data.text.tokenizer import Tokenizer

# config.json (transformers' Llama and Qwen2, and EVE on top of them) against our names.
LANGUAGE_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
}
# Numbers above 0 where they are stated.
_OPTIONAL = ("num_key_value_heads", "head_dim", "mm_hidden_size")
_FULL = "attention has no sliding window here; take a model with full attention in every layer"
_UNSCALED = "rotary embeddings are not scaled here"
# Kinds of scaling (transformers' `rope_type`) that compute the same as none when their factor is 1.
_NONE_AT_FACTOR_1 = ("linear", "dynamic", "llama3")
# What must be so for the decoder to compute the same: field, the values that will do, and what it means otherwise.
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (
        ("llama", "qwen2", "eve"),
        "Llama, Qwen2 and EVE v1 are known; take a folder of one of these",
    ),
    "hidden_act": ((None, "silu", "swish"), "the decoder's MLP is gated by SiLU"),
    "attention_bias": ((None, False), "attention has no biases here but Qwen2's, of query, key and value"),
    "mlp_bias": ((None, False), "the MLP has no biases here"),
    "partial_rotary_factor": ((None, 1), _UNSCALED),
    "use_sliding_window": ((None, False), _FULL),
    "quantization_config": ((None,), "quantised weights cannot be trained; take the original ones"),
}
# What model types mean that are easily taken for one of those.
_OTHERS = {
    "eve-qwen2": "EVE v2 is another architecture, with weights of its own for each modality; take a folder of EVE v1",
    **dict.fromkeys(
        ("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2"),
        "a vision tower is the teacher (--teacher-model); take the folder of a language model or an EVE",
    ),
}
# CLIP's, which EVE's processors take over.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class HFConfig:
    """A folder's config.json.

    Attributes:
        fields: as it stands there.
        source: its path, for messages.
    """

    fields: dict[str, Any]
    source: Path

    @staticmethod
    def read(folder: Path) -> HFConfig:
        """Read and judge it.

        Raises:
            ConfigError: no config.json, or one of a model that this decoder cannot compute.
        """
        path = folder / "config.json"
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror}; name a model folder in Hugging Face layout"
            ) from None
        except ValueError as error:
            other = wrong_content(path)
            problem = f"; it {other}" if other else f" ({error}); copy the folder again"
            raise ConfigError(f"{path}: not JSON{problem}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: holds no settings by name; copy the folder again")
        for name, (allowed, meaning) in _MUST_BE.items():
            if fields.get(name) not in allowed:
                meaning = _OTHERS.get(str(fields.get(name)), meaning)
                raise ConfigError(f"{path}: {name} is {fields.get(name)!r}, and {meaning}")
        kinds = fields.get("layer_types") or []
        windowed = (
            {str(kind) for kind in kinds} - {"full_attention"} if isinstance(kinds, list) else {str(kinds)}
        )
        if windowed:
            raise ConfigError(f"{path}: layer_types has {', '.join(sorted(windowed))!r}, and {_FULL}")
        missing = [name for name in LANGUAGE_FIELDS if not _is_positive(fields.get(name), name)]
        missing += [name for name in _OPTIONAL if fields.get(name) and not _is_positive(fields[name], name)]
        if missing:
            raise ConfigError(
                f"{path}: has no {', '.join(missing)} above 0; this is not a whole model's configuration"
            )
        head = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        if head * fields["num_attention_heads"] != fields["hidden_size"]:
            raise ConfigError(
                f"{path}: head_dim is {head}, and heads are hidden_size / num_attention_heads wide here"
            )
        found = HFConfig(fields, path)
        _check_rope(fields, found)
        return found

    @property
    def is_eve(self) -> bool:
        """Is it an EVE, or a language model alone?"""
        return bool(self.fields["model_type"] == "eve")

    @property
    def has_qkv_bias(self) -> bool:
        """Have query, key and value biases? All of Qwen2's, and those of an EVE that was made of one (`qkv_bias`)."""
        return bool(self.fields["model_type"] == "qwen2" or (self.is_eve and self.fields.get("qkv_bias")))

    @property
    def is_tied(self) -> bool:
        """Are the embedding and the output layer one matrix? No, where the file does not say."""
        return bool(self.fields.get("tie_word_embeddings"))

    @property
    def image_size(self) -> int | None:
        """Pixels of the long side, by the name of the published processor; None if it does not say."""
        found = re.search(r"-(\d+)$", str(self.fields.get("mm_vision_tower") or ""))
        return int(found[1]) if found else None

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, which transformers 5 keeps beside the kind of scaling."""
        stated = [some.get("rope_theta") for _, some in _rope_settings(self.fields)]
        return next((theta for theta in stated if theta), None) or (
            self.fields.get("rope_theta") or ModelConfig.rotary_base
        )

    def model_config(self, **front: Any) -> Preset:
        """Sizes of our model.

        Args:
            front: settings of the family that config.json does not hold: pixels and the teacher's sizes, and
                `patch_embedding_size` for a language model.
        """
        fields = self.fields
        values = {ours: fields[theirs] for theirs, ours in LANGUAGE_FIELDS.items()}
        if "mm_hidden_size" in fields:
            front["patch_embedding_size"] = fields["mm_hidden_size"]
        groups = fields.get("num_key_value_heads") or fields["num_attention_heads"]
        model = ModelConfig(
            **values,
            num_query_groups=None if groups == fields["num_attention_heads"] else groups,
            add_qkv_bias=self.has_qkv_bias,
            rotary_base=int(self.rope_theta),
        )
        return Preset(model, find_family("eve").Config(**front))


def check_config(folder: Path, settings: ModelSettings) -> HFConfig:
    """Read config.json of a folder in Hugging Face layout and compare its sizes with the run's.

    Raises:
        ConfigError: it cannot be read, or has other sizes.
    """
    found = HFConfig.read(folder)
    theirs, model = (
        found.model_config(patch_embedding_size=settings.vision.patch_embedding_size),
        settings.model,
    )
    theirs_all, ours_all = ({**asdict(some.model), **asdict(some.vision)} for some in (theirs, settings))
    for name, ours in {
        **LANGUAGE_FIELDS,
        "mm_hidden_size": "patch_embedding_size",
        "rope_theta": "rotary_base",
        "qkv_bias": "add_qkv_bias",
    }.items():
        # How long samples may be is the run's to say.
        if ours != "max_position_embeddings" and theirs_all[ours] != ours_all[ours]:
            raise ConfigError(
                f"{found.source}: {name} is {theirs_all[ours]}, this run has --{ours.replace('_', '-')} "
                f"{ours_all[ours]}; use the preset or recipe of that model"
            )
    here, there = (some.num_query_groups or some.num_attention_heads for some in (model, theirs.model))
    if here != there:
        raise ConfigError(
            f"{found.source}: num_key_value_heads is {there}, this run has --num-query-groups {here}; use the preset "
            "or recipe of that model"
        )
    return found


def _is_positive(value: object, name: str) -> bool:
    kinds = int | float if name == "rms_norm_eps" else int
    return isinstance(value, kinds) and not isinstance(value, bool) and value > 0


def _rope_settings(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """Settings of the rotary embedding that config.json states, each with its name: of transformers 5, and of 4."""
    found = [(name, fields[name]) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    # transformers 5 has one for each kind of layer where they differ.
    return [
        (name, some.get("full_attention") or some if isinstance(some, dict) else some) for name, some in found
    ]


def _check_rope(fields: dict[str, Any], found: HFConfig) -> None:
    """Refuse rotary embeddings that are scaled; a kind that scales nothing is none."""
    for name, some in _rope_settings(fields):
        if not isinstance(some, dict):
            raise ConfigError(
                f"{found.source}: {name} is {some!r}, not settings by name; copy the folder again"
            )
        kind = some.get("rope_type") or some.get("type") or "default"
        nothing = kind == "default" or (kind in _NONE_AT_FACTOR_1 and some.get("factor") == 1)
        if not nothing or some.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(f"{found.source}: rope_type is {kind!r}, and {_UNSCALED} ({name}: {some})")
    theta = found.rope_theta
    if not isinstance(theta, int | float) or not 1 <= theta < 2**63 or int(theta) != theta:
        raise ConfigError(f"{found.source}: rope_theta is {theta!r}, and a whole number from 1 on is needed")


def published_config(settings: ModelSettings, dtype: str, teacher: bool) -> dict[str, Any]:
    """The config.json of a published EVE (BAAI/EVE-7B-v1.0) with these sizes.

    Args:
        settings: sizes.
        dtype: of the weights, such as "bfloat16".
        teacher: the folder holds the teacher and the aligning layer, which the public code loads for training.
    """
    model = settings.model
    # Of today's language models: the public code knows the usual base alone, and no biases.
    rope = {} if model.rotary_base == ModelConfig.rotary_base else {"rope_theta": model.rotary_base}
    bias = {"qkv_bias": True} if model.add_qkv_bias else {}
    return {
        "architectures": ["EVELlamaForCausalLM"],
        **token_ids(None),
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "mm_hidden_size": settings.vision.patch_embedding_size,
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": f"openai/eve-patch14-anypixel-{settings.vision.image_size}",
        "mm_vision_tower_clip": "openai/clip-vit-large-patch14-336",
        "model_type": "eve",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "pretraining_tp": 1,
        **bias,
        "requires_cliploss": teacher,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": None,
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


def token_ids(tokenizer: Tokenizer | None) -> dict[str, int]:
    """The control tokens of config.json and generation_config.json; Llama's where no tokenizer is known."""
    if tokenizer is None:
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.unk_id,  # which pads in Llama's tokenizers
    }


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


def published_preprocessor(vision: Any) -> dict[str, Any]:
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
