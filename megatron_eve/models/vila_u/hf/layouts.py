"""The layout of VILA-U's published folders: where weights lie and how they are named. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

# What the rules of `models/vila_u/names.py` call tensors of the folders `mm_projector/` and `vision_tower/`.
PROJECTOR_KEYS, TOWER_KEYS = "mm_projector.", "vision_tower."
DEPTH_KEYS = f"{TOWER_KEYS}rqtransformer."
CODEBOOK_KEYS = f"{TOWER_KEYS}rqvaesiglip.quantizer.codebooks."

PARTS: Mapping[str, Mapping[str, str]] = {
    "llm": {},
    "mm_projector": {"": PROJECTOR_KEYS},
    "vision_tower": {"": TOWER_KEYS},
}
"""`HFFormat.folders`: what keys begin with there, and in `models/vila_u/names.py`."""
