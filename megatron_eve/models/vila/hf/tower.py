"""Settings of a vision tower: by the config.json of a CLIP or SigLIP, or by the name of a published one. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.json_file import read_settings
from megatron_eve.models.hf_format import Stated
from megatron_eve.models.towers.sizes import tower_fields
from megatron_eve.models.vila.config import PRESETS, VILAConfig

# config.json of a tower against our settings.
TOWER_FIELDS = {
    "hidden_size": "vision_hidden_size",
    "intermediate_size": "vision_ffn_hidden_size",
    "num_hidden_layers": "vision_num_layers",
    "num_attention_heads": "vision_num_attention_heads",
    "image_size": "image_size",
    "patch_size": "vision_patch_size",
    "hidden_act": "vision_hidden_act",
    "layer_norm_eps": "vision_norm_epsilon",
}
_SETTINGS = ("vision_model_type", *TOWER_FIELDS.values())
_ACTIVATIONS = get_args(get_type_hints(VILAConfig)["vision_hidden_act"])
# Towers that published folders name and do not hold.
_CLIP_L_336, _SIGLIP_384 = PRESETS["vila_7b"].vision, PRESETS["vila15_8b"].vision
_PUBLISHED: Mapping[str, VILAConfig] = {
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
    "openai/clip-vit-large-patch14": replace(_CLIP_L_336, image_size=224),
    "google/siglip-so400m-patch14-384": _SIGLIP_384,
    "google/siglip-so400m-patch14-224": replace(_SIGLIP_384, image_size=224),
}


def tower_settings(fields: Mapping[str, Any], source: str) -> list[Stated]:
    """The settings of a tower with this config.json.

    Args:
        fields: of CLIP or SigLIP, of its vision side alone or of a whole model.
        source: of them, for messages, such as the file or a section of one.

    Raises:
        ConfigError: another tower, or one that is not computed here.
    """
    try:
        vision = tower_fields(fields)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    values = {field: vision[field] for field in TOWER_FIELDS}
    for field, value in values.items():
        number = isinstance(value, float if field == "layer_norm_eps" else int) and not isinstance(
            value, bool
        )
        if field == "hidden_act":
            if value not in _ACTIVATIONS:
                known = ", ".join(_ACTIVATIONS)
                raise ConfigError(
                    f"{source}: hidden_act of the vision tower is {value!r}, and one of {known} is needed"
                )
        elif not number or value <= 0:
            raise ConfigError(
                f"{source}: {field} of the vision tower is {value!r}, and a number above 0 is needed"
            )
    if vision.get("vision_use_head") is False:
        raise ConfigError(
            f"{source}: vision_use_head is false, and the vision tower is kept whole here, with its pooling head; take "
            "the published tower"
        )
    return [
        Stated("vision_model_type", vision["model_type"], "model_type of the vision tower"),
        *(
            Stated(ours, values[field], f"{field} of the vision tower")
            for field, ours in TOWER_FIELDS.items()
        ),
    ]


def folder_settings(folder: Path, flag: str = "") -> list[Stated]:
    """The settings of the tower in a folder.

    Args:
        folder: in Hugging Face layout.
        flag: that names it, for messages; "" for a part of a model's folder.

    Raises:
        ConfigError: no config.json there, or one of something else.
    """
    path = folder / "config.json"
    fields = read_settings(path, "name the folder of a CLIP or SigLIP tower in Hugging Face layout", flag)
    return tower_settings(fields, f"{flag} {path}" if flag else str(path))


def published_settings(name: str) -> list[Stated]:
    """The settings of a published tower by its name on the hub; [] where that is not known."""
    config = _PUBLISHED.get(name)
    field = f"mm_vision_tower {name}"
    return [Stated(ours, getattr(config, ours), field, assumed=True) for ours in _SETTINGS] if config else []


def published_name(vision: VILAConfig) -> str | None:
    """The name on the hub of a tower with these settings; None where no published one has them."""
    for name, config in _PUBLISHED.items():
        if all(getattr(config, ours) == getattr(vision, ours) for ours in _SETTINGS):
            return name
    return None
