"""Seeds of the random numbers in a step: those of dropout, of the adapters (`--lora-dropout`) or of the family."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_eve.config import RunConfig
from megatron_eve.models.registry import find_family


def seed_dropout(config: RunConfig, consumed_samples: int) -> None:
    """Seed this rank's streams for a step, by the run's seed and the step's place in the order of samples.

    So a resumed run, or a step that is run again, draws the zeros that it drew before, without any saved state. Ranks
    that hold other samples, other rows (context parallelism) or other layers draw other ones. Of the tensor-parallel
    ranks, the default stream is the same and that of megatron-core's tracker is each its own.

    Args:
        config: of the run; nothing is done without dropout, so that such a run keeps the random numbers it had.
        consumed_samples: before the step.
    """
    adapters = config.lora.enabled and config.lora.lora_dropout
    if not (adapters or find_family(config.family).draws_random_numbers(config)):
        return
    words = (
        config.training.seed,
        consumed_samples,
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    seed = int(np.random.SeedSequence(words).generate_state(1)[0])
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
