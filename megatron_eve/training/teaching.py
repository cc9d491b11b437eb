"""The teacher in a run: on the last stage only, its images shared by the ranks that share a pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import PackedBatch, TeacherShare
from megatron_eve.data.geometry import PATCH_SIZE
from megatron_eve.data.sampling.loader import AHEAD
from megatron_eve.models.eve.teacher import Teacher
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device
from megatron_eve.training.monitoring.flops import TeacherSizes


def runs_teacher(config: RunConfig) -> bool:
    """True on ranks that hold the last stage of a model with an aligning layer."""
    return config.vision.patch_aligning and parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def build_teacher(config: RunConfig) -> Teacher | None:
    """Load the teacher where it runs; None elsewhere.

    Raises:
        ConfigError: see `Teacher`.
    """
    if not runs_teacher(config):
        return None
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return Teacher(config.vision, dtype=dtype, device=accelerator().device)


def teacher_share(config: RunConfig) -> TeacherShare | None:
    """Which images of its packs this rank decodes for the teacher; None where no teacher runs."""
    if not runs_teacher(config):
        return None
    return TeacherShare(
        config.vision.tower().patch_size,
        rank=parallel_state.get_tensor_and_context_parallel_rank(),
        ranks=parallel_state.get_tensor_and_context_parallel_world_size(),
    )


def teacher_sizes(config: RunConfig) -> TeacherSizes | None:
    """What the teacher costs, for the count of FLOPs; None without one."""
    if not config.vision.patch_aligning:
        return None
    tower = config.vision.tower()
    return TeacherSizes(
        # Hidden state 0 is the embedding; layers behind the target are not needed.
        layers=config.vision.teacher_hidden_state % (tower.num_layers + 1),
        hidden_size=tower.hidden_size,
        ffn_hidden_size=tower.ffn_hidden_size,
        tokens=(config.vision.teacher_size // PATCH_SIZE) ** 2 + 1,
        patch_values=3 * tower.patch_size**2,
    )


def pack_features(teacher: Teacher, batch: PackedBatch) -> torch.Tensor:
    """Teacher features of all images of a pack: [images * G * G, K], image after image.

    Each rank computes its share of the images; collective over the ranks that share the pack, unless it has no
    image.
    """
    count = len(batch.image_grids)
    assert batch.teacher_images is not None, "this rank's loader prepares no pictures for the teacher"
    patches = teacher.grid**2
    device = accelerator().device
    ranks = parallel_state.get_tensor_and_context_parallel_world_size()
    each = -(-count // ranks)
    features = torch.zeros(each, patches, teacher.width, dtype=teacher.dtype, device=device)
    if len(batch.teacher_images):
        features[: len(batch.teacher_images)] = teacher(to_device(batch.teacher_images, device))
    if ranks == 1 or not count:
        return features.flatten(0, 1)
    everyone = features.new_empty(ranks * each, patches, teacher.width)
    group = parallel_state.get_tensor_and_context_parallel_group()
    torch.distributed.all_gather_into_tensor(everyone, features, group=group)
    return everyone.flatten(0, 1)


def teach_ahead(teacher: Teacher, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
    """Features of a step's first packs, before the schedule begins.

    The last stage of a pipeline has nothing to do until the first pack has come through all others, and the teacher,
    which needs pictures only, can use that time: on a GPU its kernels run before the first receive. As many packs as
    there are stages before, at most those whose pictures are ready by then; none without a pipeline.
    """
    waits = parallel_state.get_pipeline_model_parallel_world_size() - 1
    return [pack_features(teacher, batches[i]) for i in range(min(waits, AHEAD, len(batches)))]


def shared_identity(config: RunConfig) -> dict[str, Any] | None:
    """Path and hashes of the teacher, hashed once and told to every rank; None without one. Collective."""
    told: list[dict[str, Any] | None] = [None]
    if torch.distributed.get_rank() == 0:
        told[0] = find_family(config.family).fingerprint(config)
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
