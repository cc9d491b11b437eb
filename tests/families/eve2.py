"""EVE v2 in the shared tests."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.config.recipe import parse
from tests.families.suite import FamilyCase
from tests.families.vila import PP2_UNEVEN, PP2_VPP2
from tests.layouts import CP2, DP2, ONE, PP4, TP2_PP2, TP2_SP, TP2_SP_CP2


def run_config(parallel: ParallelConfig, iterations: int = 20) -> RunConfig:
    """A small run on mock data, from its own weights; all of them train."""
    flags = ["--family", "eve2", "--preset", "eve2_tiny", "--mock-data", "--seq-length", "512"]
    flags += ["--global-batch-size", "8", "--train-iters", str(iterations), "--lr", "1e-3"]
    return replace(parse(flags), parallel=parallel)


EVE2 = FamilyCase(
    family="eve2",
    config=run_config,
    learns=("lm loss",),  # how often a token comes: the words of mock data are random
    layouts=(),  # their float64 matrix has all
    slow_layouts=(TP2_PP2, TP2_SP, PP2_UNEVEN, PP2_VPP2, PP4, CP2, DP2, TP2_SP_CP2),
    resumed=(TP2_PP2,),
    slow_resumed=(ONE, CP2, DP2),
    saved=(TP2_PP2, (CP2, PP2_UNEVEN)),
)
