"""EVE in the shared tests."""

from __future__ import annotations

from typing import Any

from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.eve.config import EVEConfig
from tests.families.suite import FamilyCase
from tests.golden_dir import find_golden
from tests.layouts import (
    CP2,
    DP2,
    ONE,
    PP2,
    PP2_UNEVEN,
    PP2_VPP2,
    PP4_UNEVEN,
    TP2_DP2,
    TP2_PP2,
    TP2_SP,
    TP2_SP_CP2,
)

TEACHER = "_shared/openai/clip-mini-patch14-112"


def run_config(parallel: ParallelConfig, iterations: int = 20, **training: Any) -> RunConfig:
    """A small run from the published test weights, with several packs a step and the aligning layer."""
    return RunConfig(
        model=ModelConfig(),
        parallel=parallel,
        training=TrainingConfig(global_batch_size=8, train_iters=iterations, **training),
        vision=EVEConfig(patch_aligning=True, teacher_model=str(find_golden(TEACHER))),
        optimizer=OptimizerConfig(lr=4e-5, lr_warmup_fraction=0.1),
        data=DataConfig(mock_data=True, seq_length=512),
        checkpoint=CheckpointConfig(pretrained_checkpoint=str(find_golden("_shared/hf_mini224"))),
    )


EVE = FamilyCase(
    family="eve",
    config=run_config,
    learns=("lm loss", "align loss"),
    layouts=(PP2_VPP2, PP2_UNEVEN),
    slow_layouts=(TP2_SP, PP2, PP4_UNEVEN, CP2, DP2, TP2_PP2, TP2_DP2, TP2_SP_CP2),
    resumed=(PP2_VPP2,),
    slow_resumed=(ONE, TP2_SP, CP2, TP2_PP2, TP2_DP2),
    saved=(TP2_PP2, (DP2, ONE, PP2_VPP2, PP4_UNEVEN, CP2)),
    conversion=lambda: ["--teacher-model", str(find_golden(TEACHER))],
)
