"""Target models: frozen models that compute the targets of objectives, on the last pipeline stage only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.sampling.loader import AHEAD
from megatron_eve.models.model_parts import TargetModel
from megatron_eve.models.registry import find_family

TargetModels = Mapping[str, TargetModel]
Targets = Mapping[str, torch.Tensor]


def build_target_models(config: RunConfig) -> TargetModels:
    """Load the target models of a run on ranks of the last stage; none elsewhere.

    Raises:
        ConfigError: see `FamilyObjective.target_model`.
    """
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return {}
    models = {
        objective.name: objective.target_model()
        for objective in find_family(config.family).objectives(config)
    }
    return {name: model for name, model in models.items() if model is not None}


def pack_targets(models: TargetModels, batch: PackedBatch) -> Targets:
    """Targets of a pack, by objective. Collective over the ranks that share the pack."""
    return {name: model(batch) for name, model in models.items()}


def prefetch_targets(models: TargetModels, batches: Sequence[PackedBatch]) -> list[Targets]:
    """Targets of a step's first packs, before the schedule begins.

    The last stage of a pipeline has nothing to do until the first pack has come through all others, and target models,
    which need pictures only, can use that time: on a GPU their kernels run before the first receive. As many packs as
    there are stages before, at most those whose pictures are ready by then; none without a pipeline.
    """
    if not models:
        return []
    waits = parallel_state.get_pipeline_model_parallel_world_size() - 1
    return [pack_targets(models, batches[i]) for i in range(min(waits, AHEAD, len(batches)))]


def shared_fingerprint(config: RunConfig) -> dict[str, Any] | None:
    """The fingerprint of the frozen models (`ModelFamily.fingerprint`), read on rank 0 for all ranks. Collective."""
    fingerprint: list[dict[str, Any] | None] = [None]
    if torch.distributed.get_rank() == 0:
        fingerprint[0] = find_family(config.family).fingerprint(config)
    torch.distributed.broadcast_object_list(fingerprint, src=0)
    return fingerprint[0]
