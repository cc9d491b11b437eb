"""The layouts of VILA's folders: where weights lie and how they are named. Imports no torch.

| layout | config.json | folders |
|---|---|---|
| flat | `model_type` llava_llama, no `llm_cfg`: VILA 1.0, LLaVA-1.5 | one; names of `models/vila/names.py` |
| parts | `llm_cfg`: VILA-1.5 and NVILA | `llm/`, `vision_tower/`, `mm_projector/` |
| llava | `text_config`: transformers' own LLaVA, and `modeling_vila.py` | one; names of transformers |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

# What VILA 1.0's keys of a tower begin with, and of a projector.
TOWER_KEYS = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_KEYS = "model.mm_projector."

LayoutName = Literal["flat", "parts", "llava"]

# `HFFormat.folders` of each: what keys begin with there, and in `models/vila/names.py`.
FLAT: Mapping[str, Mapping[str, str]] = {".": {}}
PARTS: Mapping[str, Mapping[str, str]] = {
    "llm": {},
    "vision_tower": {"vision_model.": TOWER_KEYS},
    "mm_projector": {"layers.": PROJECTOR_KEYS},
}
_LLAVA_PROJECTOR = {"linear_1.": f"{PROJECTOR_KEYS}0.", "linear_2.": f"{PROJECTOR_KEYS}2."}
# As transformers 4 saves it; an export has these names, which 5 reads, too.
LLAVA: Mapping[str, Mapping[str, str]] = {
    ".": {
        "language_model.": "",
        "vision_tower.vision_model.": TOWER_KEYS,
        **{f"multi_modal_projector.{theirs}": ours for theirs, ours in _LLAVA_PROJECTOR.items()},
    }
}
# The model of `modeling_vila.py`, for other projectors: the names of modules in transformers 5.
OWN_CODE: Mapping[str, Mapping[str, str]] = {
    ".": {
        "model.language_model.": "model.",
        "model.vision_tower.": TOWER_KEYS,
        "model.multi_modal_projector.layers.": PROJECTOR_KEYS,
    }
}
# As both are read: transformers 5 leaves "vision_model." out, and some versions save the names of their modules.
_LLAVA_READ = {
    ".": {
        **LLAVA["."],
        **OWN_CODE["."],
        "vision_tower.": TOWER_KEYS,
        "model.vision_tower.vision_model.": TOWER_KEYS,
        **{f"model.multi_modal_projector.{theirs}": ours for theirs, ours in _LLAVA_PROJECTOR.items()},
    }
}
# `HFFormat.module_names`: where the modules are in transformers 5, of transformers' LLaVA and of `modeling_vila.py`.
OWN_CODE_MODULES: Mapping[str, str] = {ours: theirs for theirs, ours in OWN_CODE["."].items()}
LLAVA_MODULES: Mapping[str, str] = {
    **OWN_CODE_MODULES,
    **{ours: f"model.multi_modal_projector.{theirs}" for theirs, ours in _LLAVA_PROJECTOR.items()},
}
# What keys of a tower's own folder begin with: as transformers 4 saves it, or a model with a text side; as 5 does.
TOWER_FOLDER: Mapping[str, str] = {"vision_model.": TOWER_KEYS, "": TOWER_KEYS}

# Fields that NVILA's config.json has and VILA-1.5's has not. Both name the projector mlp_downsample and mean other
# orders of its rows.
_NVILA_FIELDS = ("image_encoder", "min_tiles", "max_tiles", "dynamic_s2", "ps3")


def layout_of(fields: Mapping[str, Any]) -> LayoutName:
    """The layout of a folder of this family with this config.json."""
    if "llm_cfg" in fields:
        return "parts"
    return "llava" if "text_config" in fields or "vision_config" in fields else "flat"


def folders_of(fields: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
    """See `HFFormat.folders`."""
    return {"flat": FLAT, "parts": PARTS, "llava": _LLAVA_READ}[layout_of(fields)]


def is_nvila(fields: Mapping[str, Any]) -> bool:
    """Is it config.json of NVILA (public code since January 2025), whose rows of a picture lie row by row?"""
    return any(name in fields for name in _NVILA_FIELDS)
