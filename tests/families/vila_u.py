"""VILA-U in the shared tests."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.config.recipe import parse
from tests.families.suite import FamilyCase
from tests.layouts import CP2, DP2, ONE, PP4, TP2_PP2, TP2_SP, TP2_SP_CP2, layout

# Of four layers.
PP2_UNEVEN = layout("PP2(3+1)", 2, pp=2, decoder_last_pipeline_num_layers=1)
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=1)


def run_config(parallel: ParallelConfig, iterations: int = 20) -> RunConfig:
    """A small run on mock data, from its own weights; half of its pictures are drawn. Without dropout, whose zeros
    depend on the layout."""
    flags = ["--family", "vila_u", "--preset", "vila_u_tiny", "--mock-data", "--seq-length", "512"]
    flags += ["--depth-dropout", "0", "--visual-loss-chunk", "7"]
    flags += ["--global-batch-size", "8", "--train-iters", str(iterations), "--lr", "1e-3"]
    return replace(parse(flags), parallel=parallel)


VILA_U = FamilyCase(
    family="vila_u",
    config=run_config,
    learns=("lm loss",),  # how often a token comes: words and codes of mock data are random
    layouts=(),  # their float64 matrix has all
    slow_layouts=(TP2_PP2, TP2_SP, PP2_UNEVEN, PP2_VPP2, PP4, CP2, DP2, TP2_SP_CP2),
    resumed=(TP2_PP2,),
    slow_resumed=(ONE, CP2, DP2),
    saved=(TP2_PP2, (CP2, PP2_UNEVEN)),
    converts=False,
    answers=False,
)
