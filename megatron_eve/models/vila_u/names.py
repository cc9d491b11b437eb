"""Names of VILA-U's tensors, beside the decoder's, as published; `hf/layouts.py` says in which folders they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from typing_extensions import override

from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import Column, Layout, Replicated, Row, Sizes
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.hf.layouts import CODEBOOK_KEYS, DEPTH_KEYS, PROJECTOR_KEYS


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
        *_depth_rules(),
        Rule(f"{ours}1.weight", (f"{theirs}0.weight",), Column()),
        Rule(f"{ours}1.bias", (f"{theirs}0.bias",), Column()),
        Rule(f"{ours}2.weight", (f"{theirs}2.weight",), Row()),
        Rule(f"{ours}2.bias", (f"{theirs}2.bias",), Replicated()),
    )


# Modules of a block: ours, the published ones, and how matrix and bias are spread over tensor-parallel ranks.
_COLUMN, _ROW, _WHOLE = (Column(), Column()), (Row(), Replicated()), (Replicated(), Replicated())
_BLOCK: tuple[tuple[str, str, tuple[Layout, Layout]], ...] = (
    ("ln1", "ln1", _WHOLE),
    ("ln2", "ln2", _WHOLE),
    ("query", "attn.query", _COLUMN),
    ("key", "attn.key", _COLUMN),
    ("value", "attn.value", _COLUMN),
    ("proj", "attn.proj", _ROW),
    ("fc1", "mlp.0", _COLUMN),
    ("fc2", "mlp.2", _ROW),
)


def _depth_rules() -> Iterator[Rule]:
    """Those of the depth transformer."""
    ours, theirs = "visual_head.transformer.", DEPTH_KEYS
    modules = [
        ("in_mlp_1", "in_mlp_1", _WHOLE),
        ("in_mlp_2", "in_mlp_2", _WHOLE),
        ("layer_norm", "classifier_mlp.layer_norm", _WHOLE),
        ("classifier", "classifier_mlp.linear", _COLUMN),
        *((f"blocks.*.{here}", f"head_transformer.blocks.*.{there}", how) for here, there, how in _BLOCK),
    ]
    for here, there, layouts in modules:
        for tensor, layout in zip(("weight", "bias"), layouts, strict=True):
            yield Rule(f"{ours}{here}.{tensor}", (f"{theirs}{there}.{tensor}",), layout)
    yield Rule(f"{ours}pos_emb_d", (f"{theirs}pos_emb_d",), Replicated())
