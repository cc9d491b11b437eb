"""Parallel layouts as parameters of tests, not copies of them."""

from __future__ import annotations

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
    """Build a layout; `tp` and `pp` are short for the long names."""
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    return Layout(name, world_size, ParallelConfig(**{names.get(k, k): v for k, v in sizes.items()}))


ONE = layout("TP1", 1)
TP2_SP = layout("TP2+SP", 2, tp=2, sequence_parallel=True)
TP2 = layout("TP2", 2, tp=2)
PP2 = layout("PP2", 2, pp=2)
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=2)
DP2 = layout("DP2", 2)
TP2_PP2 = layout("TP2xPP2", 4, tp=2, pp=2, sequence_parallel=True)
TP2_DP2 = layout("TP2xDP2", 4, tp=2, sequence_parallel=True)
PP4_VPP2 = layout("PP4xVPP2", 4, pp=4, num_layers_per_virtual_pipeline_stage=1)


def parametrize(*layouts: Layout) -> pytest.MarkDecorator:
    """A test for each of these layouts, as the argument `layout`."""
    return pytest.mark.parametrize("layout", layouts, ids=lambda some: some.name)
