"""config.json of VILA's folders: what is read of it, and what cannot be computed here. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.hf_format import Stated
from megatron_eve.models.vila.config import ProjectorType
from megatron_eve.models.vila.hf.layouts import is_nvila, layout_of
from megatron_eve.models.vila.hf.tower import folder_settings, published_settings, tower_settings
from megatron_eve.models.vila.tiles import MOST_TILES

_NO_S2 = "features of a picture at several scales (S2) are not computed here; take a model without them"
_OTHER_FIT = "pictures are fitted by pad, square, resize and dynamic here; take a model with one of these"
# Fields with a meaning that is not built: field, values that ask for nothing, error message.
_NOT_BUILT: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("s2", (None, False), _NO_S2),
    ("dynamic_s2", (None, False), _NO_S2),
    ("ps3", (None, False), "pictures of 4K by a PS3 tower are not computed here; take a model without it"),
    (
        "vision_resolution",
        (None, -1),
        "position embeddings of the vision tower are not resized here; take a model at its tower's own resolution",
    ),
    (
        "mm_use_im_start_end",
        (None, False),
        "no tokens stand around a picture here; take a model without them",
    ),
)
# image_aspect_ratio of config.json, and --image-fit. The public code crops where the field says nothing.
_FITS = {"pad": "pad", "square": "crop", None: "crop", "resize": "stretch", "dynamic": "tiles"}
# Where a flat folder may hold the config.json of the tower whose weights it has; the published ones name it by its id.
TOWER_CONFIG = "vision_tower_config"
# What transformers takes for fields that a section of config.json leaves out.
_LANGUAGE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    },
    "qwen2": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip


def language_fields(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """See `HFFormat.language_fields`: transformers' LLaVA has a section, which leaves out what Llama's defaults are."""
    if layout_of(fields) != "llava":
        return None
    text = fields.get("text_config")
    text = text if isinstance(text, dict) else {}
    kind = str(text.get("model_type", "llama"))
    tied = (
        {} if "tie_word_embeddings" not in fields else {"tie_word_embeddings": fields["tie_word_embeddings"]}
    )
    return {"model_type": kind, **_LANGUAGE_DEFAULTS.get(kind, {}), **tied, **text}


def field_errors(fields: Mapping[str, Any]) -> Iterator[str]:
    """See `HFFormat.check_fields`."""
    for name, allowed, meaning in _NOT_BUILT:
        if fields.get(name) not in allowed:
            yield f"{name} is {fields[name]!r}, and {meaning}"
    fit = fields.get("image_aspect_ratio")
    if fit not in _FITS:
        yield f"image_aspect_ratio is {fit!r}, and {_NO_S2 if fit == 'dynamic_s2' else _OTHER_FIT}"
    yield from _tile_errors(fields)
    projector = _projector_type(fields)
    if str(projector).endswith(("_s2", "_s2_new")):
        yield f"mm_projector_type is {projector!r}, and {_NO_S2}"
    elif projector not in get_args(ProjectorType):
        yield (
            f"mm_projector_type is {projector!r}, and these are known here: "
            f"{', '.join(name for name in get_args(ProjectorType) if name != 'qformer')}"
        )
    layer = _select_layer(fields)
    if not isinstance(layer, int) or isinstance(layer, bool):
        yield f"{_layer_field(fields)} is {layer!r}, and features of one layer of the vision tower are taken here"
    if layout_of(fields) == "llava":
        if fields.get("projector_hidden_act", "gelu") != "gelu":
            yield f"projector_hidden_act is {fields['projector_hidden_act']!r}, and gelu is computed here"
        if fields.get("multimodal_projector_bias", True) is not True:
            yield "multimodal_projector_bias is false, and the projector has biases here"
        if not isinstance(fields.get("vision_config"), dict):
            yield "vision_config is not there, so the vision tower is not known; copy the folder again"


def _tile_errors(fields: Mapping[str, Any]) -> Iterator[str]:
    if fields.get("image_aspect_ratio") != "dynamic":
        return
    if fields.get("min_tiles") not in (None, 1):
        yield f"min_tiles is {fields['min_tiles']!r}, and a picture may be one tile here; take a model with 1"
    most = fields.get("max_tiles", MOST_TILES)
    if type(most) is not int or not 1 <= most <= MOST_TILES:
        yield f"max_tiles is {most!r}, and pictures are cut into 1 to {MOST_TILES} tiles here"


def stated(fields: Mapping[str, Any], folder: Path) -> list[Stated]:
    """See `HFFormat.stated`. Sizes of a tower that is neither there nor known by its name are left out.

    Raises:
        ConfigError: a tower of another architecture, or features of it that are not those taken here.
    """
    layout = layout_of(fields)
    if layout == "parts":
        tower = folder_settings(folder / "vision_tower")
    elif layout == "llava":
        vision = {"model_type": "clip_vision_model", **fields["vision_config"]}
        tower = tower_settings(vision, f"{folder / 'config.json'}: vision_config")
    elif (folder / TOWER_CONFIG / "config.json").is_file():
        tower = folder_settings(folder / TOWER_CONFIG)
    else:
        tower = published_settings(str(fields.get("mm_vision_tower")))
    kind = next((some.value for some in tower if some.setting == "vision_model_type"), None)
    _check_features(fields, folder, kind)
    projector = _projector_type(fields)
    column = projector == "mlp_downsample" and not is_nvila(fields)
    order = fields.get("projector_token_order", "column" if column else "row")
    fit = _FITS[fields.get("image_aspect_ratio")] if layout != "llava" else _llava_fit(folder)
    queries = [Stated(name, fields[name], name) for name in ("qformer_num_queries",) if name in fields]
    tiles = [Stated("max_tiles", fields.get("max_tiles", MOST_TILES), "max_tiles")] if fit == "tiles" else []
    return [
        *tower,
        *tiles,
        *queries,
        Stated("vision_select_layer", _select_layer(fields), _layer_field(fields)),
        Stated("projector_type", projector, "mm_projector_type"),
        Stated("projector_token_order", order, "the order of rows that it asks for"),
        Stated("image_fit", fit, "image_aspect_ratio"),
    ]


def _projector_type(fields: Mapping[str, Any]) -> Any:
    if layout_of(fields) == "llava":
        return fields.get("mm_projector_type", "mlp2x_gelu")
    section = fields.get("mm_projector_cfg")
    stated = section.get("mm_projector_type") if isinstance(section, dict) else None
    return stated or fields.get("mm_projector_type", "linear")


def _layer_field(fields: Mapping[str, Any]) -> str:
    return "vision_feature_layer" if layout_of(fields) == "llava" else "mm_vision_select_layer"


def _select_layer(fields: Mapping[str, Any]) -> Any:
    return fields.get(_layer_field(fields), -2)


def _check_features(fields: Mapping[str, Any], folder: Path, kind: str | None) -> None:
    """Refuse rows of a tower that are not those taken here: all of SigLIP's, and all but the class token of CLIP's."""
    name, default = "mm_vision_select_feature", None
    allowed: dict[str, tuple[str | None, ...]] = {"clip": (None, "patch"), "siglip": (None, "cls_patch")}
    if layout_of(fields) == "llava":
        name, default = "vision_feature_select_strategy", "default"
        allowed = {"clip": ("default",), "siglip": ("full",)}
    value = fields.get(name, default)
    if kind is not None and value not in allowed[kind]:
        what = {
            "clip": "all rows of a CLIP tower but its class token",
            "siglip": "all rows of a SigLIP tower",
        }[kind]
        raise ConfigError(f"{folder / 'config.json'}: {name} is {value!r}, and {what} are taken here")


def _llava_fit(folder: Path) -> str:
    """`--image-fit` by the image processor of transformers' LLaVA: a part of the processor's file in transformers 5."""
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            content = content[part] if part else content
            if content.get("do_pad"):
                return "pad"
            return "crop" if content.get("do_center_crop", True) else "stretch"
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return "crop"
