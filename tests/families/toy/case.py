"""The toy in the shared tests."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.config import ParallelConfig, RunConfig
from megatron_eve.config.recipe import parse
from tests.families.suite import FamilyCase
from tests.layouts import CP2, DP2, ONE, TP2_PP2, TP2_SP, TP2_SP_CP2, layout

FAMILY = "tests.families.toy.family"
# Of four layers.
PP2_VPP2 = layout("PP2xVPP2", 2, pp=2, num_layers_per_virtual_pipeline_stage=1)


def run_config(parallel: ParallelConfig, iterations: int = 20) -> RunConfig:
    """A small run on mock data, from its own weights."""
    flags = ["--family", FAMILY, "--preset", "toy_tiny", "--mock-data", "--seq-length", "512"]
    flags += ["--global-batch-size", "8", "--train-iters", str(iterations), "--lr", "4e-5"]
    return replace(parse(flags), parallel=parallel)


TOY = FamilyCase(
    family=FAMILY,
    config=run_config,
    learns=("colour loss",),  # the words of mock data are random
    layouts=(TP2_PP2,),
    slow_layouts=(TP2_SP, PP2_VPP2, CP2, DP2, TP2_SP_CP2),
    resumed=(TP2_PP2,),
    slow_resumed=(ONE, CP2, DP2),
    saved=(TP2_PP2, (CP2,)),
)
