"""The layouts of VILA-U's folders: where weights lie and how they are named. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What the rules of `models/vila_u/names.py` call tensors of the folders `mm_projector/` and `vision_tower/`.
PROJECTOR_KEYS, TOWER_KEYS = "mm_projector.", "vision_tower."
DEPTH_KEYS = f"{TOWER_KEYS}rqtransformer."
CODEBOOK_KEYS = f"{TOWER_KEYS}rqvaesiglip.quantizer.codebooks."

# `HFFormat.folders` of each: what keys begin with there, and in `models/vila_u/names.py`.
PARTS: Mapping[str, Mapping[str, str]] = {
    "llm": {},
    "mm_projector": {"": PROJECTOR_KEYS},
    "vision_tower": {"": TOWER_KEYS},
}
"""The published one."""
TRANSFORMERS: Mapping[str, Mapping[str, str]] = {".": {"rqtransformer.": DEPTH_KEYS}}
"""That of `modeling_vila_u.py`."""
MODULES: Mapping[str, str] = {ours: theirs for theirs, ours in TRANSFORMERS["."].items()}
"""`HFFormat.module_names`."""


def is_published(fields: Mapping[str, Any]) -> bool:
    """Is it config.json of a published folder, not of one for transformers?"""
    return "vision_config" not in fields
