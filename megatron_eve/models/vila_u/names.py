"""Names of VILA-U's tensors, beside the decoder's, as published; `hf/layouts.py` says what keys of folders begin with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import Column, Layout, Replicated, Row, Sizes
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.hf.layouts import CODEBOOK_KEYS, PROJECTOR_KEYS


class Stacked(Layout):
    """Tensors of one shape, one above the other, with a first dimension more; whole on each rank."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return torch.stack(list(parts))

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        return list(full.unbind())


def rules(vision: VILAUConfig) -> tuple[Rule, ...]:
    """All rules beside the decoder's."""
    codebooks = tuple(f"{CODEBOOK_KEYS}{level}.weight" for level in range(vision.codebooks))
    ours, theirs = "vision_model.projector.encoder.linear_fc", f"{PROJECTOR_KEYS}layers."
    return (
        Rule("vision_model.codebook.weight", codebooks, Stacked()),
        Rule("visual_head.codebook.weight", codebooks, Stacked()),
        Rule(f"{ours}1.weight", (f"{theirs}0.weight",), Column()),
        Rule(f"{ours}1.bias", (f"{theirs}0.bias",), Column()),
        Rule(f"{ours}2.weight", (f"{theirs}2.weight",), Row()),
        Rule(f"{ours}2.bias", (f"{theirs}2.bias",), Replicated()),
    )
