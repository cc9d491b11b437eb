"""Parallel layouts as parameters of tests, not copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_eve.config import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """A layout by its short name."""

    name: str
    world_size: int
    parallel: ParallelConfig


def layout(name: str, world_size: int, **sizes: Any) -> Layout:
    """Build a layout; `tp`, `pp`, `cp` and `sp` are short for the long names."""
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "sp": "sequence_parallel",
    }
    return Layout(name, world_size, ParallelConfig(**{names.get(k, k): v for k, v in sizes.items()}))


ONE = layout("TP1", 1)
TP2_SP = layout("TP2+SP", 2, tp=2, sp=True)
TP2 = layout("TP2", 2, tp=2)
PP2 = layout("PP2", 2, pp=2)
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=2)
DP2 = layout("DP2", 2)
TP2_PP2 = layout("TP2xPP2", 4, tp=2, pp=2, sp=True)
TP2_DP2 = layout("TP2xDP2", 4, tp=2, sp=True)
PP4 = layout("PP4", 4, pp=4)
CP2 = layout("CP2", 2, cp=2)
CP4 = layout("CP4", 4, cp=4)
TP2_CP2 = layout("TP2xCP2", 4, tp=2, cp=2)
TP2_SP_CP2 = layout("TP2+SPxCP2", 4, tp=2, cp=2, sp=True)
PP2_VPP2_CP2 = layout("PP2xVPP2xCP2", 4, pp=2, cp=2, num_layers_per_virtual_pipeline_stage=2)
CP2_DP2 = layout("CP2xDP2", 4, cp=2)
PP2_UNEVEN = layout("PP2(5+3)", 2, pp=2, decoder_first_pipeline_num_layers=5)
PP4_UNEVEN = layout(
    "PP4(1+3+3+1)", 4, pp=4, decoder_first_pipeline_num_layers=1, decoder_last_pipeline_num_layers=1
)
PP2_VPP2_UNEVEN = layout("PP2xVPP2(1+3+3+1)", 2, pp=2, pipeline_model_parallel_layout="Et|t*3|t*3|t,L")
# Stages and chunks without a layer: the embedding alone, nothing at all, the loss alone.
PP4_ENDS = layout("PP4(0+5+3+0)", 4, pp=4, pipeline_model_parallel_layout="E|t*5|t*3|L")
PP2_VPP3_EMPTY = layout("PP2xVPP3(0+3+0+3+2+0)", 2, pp=2, pipeline_model_parallel_layout="E|t*3||t*3|t*2|L")
PP4_VPP2 = layout("PP4xVPP2", 4, pp=4, num_layers_per_virtual_pipeline_stage=1)


def parametrize(*layouts: Layout, slow: Sequence[Layout] = ()) -> pytest.MarkDecorator:
    """A test for each of these layouts, as the argument `layout`; `slow` ones only in `make test-slow`."""
    some = [*layouts, *(pytest.param(layout, marks=pytest.mark.slow) for layout in slow)]
    return pytest.mark.parametrize("layout", some, ids=[layout.name for layout in (*layouts, *slow)])
