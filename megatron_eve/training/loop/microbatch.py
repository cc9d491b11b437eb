"""From a `PackedBatch` of the loader to the model's inputs on this rank.

Every rank knows a pack's shapes from the manifest. On the first stage one of the ranks that share a pack decodes
its pictures and sends the pixels to the others, or each decodes its share; the last stage does the same for the
pictures of target models (`ModelFamily.views`). Pixels never travel between stages.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.decoder.context_parallel import gathered_order
from megatron_eve.models.decoder.model import ModelInputs, VisionLanguageModel
from megatron_eve.models.decoder.pack_rows import context_rows
from megatron_eve.models.decoder.packed import packed_params
from megatron_eve.models.model_parts import ImageShare, VisualInputs
from megatron_eve.models.registry import find_family
from megatron_eve.models.shapes import rows_sent
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device
from megatron_eve.training.loop.targets import TargetModels, Targets, pack_targets


def decoded_views(config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The views that this rank's loader decodes: those of all images of a pack, and those of its share of them."""
    stages = {
        "first": parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        "last": parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    }
    used = {name: use for name, use in find_family(config.family).views(config).items() if stages[use.stage]}
    sends = parallel_state.get_tensor_and_context_parallel_rank() == 0
    return (
        tuple(name for name, use in used.items() if not use.shared and sends),
        tuple(name for name, use in used.items() if use.shared),
    )


def image_share() -> ImageShare:
    """This rank's share of the images of a pack, if the ranks of a stage share them."""
    return ImageShare(
        parallel_state.get_tensor_and_context_parallel_rank(),
        parallel_state.get_tensor_and_context_parallel_world_size(),
    )


def model_inputs(
    batch: PackedBatch,
    chunk: VisionLanguageModel,
    models: TargetModels | None = None,
    targets: Targets | None = None,
) -> ModelInputs:
    """Move what a model chunk needs of a pack to the device.

    Rows with labels are selected here, on the host, so that the host never waits for a count from the device.

    Args:
        batch: the pack, on the host.
        chunk: its position in the pipeline decides which inputs it needs.
        models: target models by objective; an objective without its target model is not computed.
        targets: of this pack, if they are already computed (see `prefetch_targets`).
    """
    device = accelerator().device
    lengths = batch.cu_seqlens_padded.diff().tolist()
    inputs = ModelInputs(
        packed=packed_params(to_device(batch.cu_seqlens_padded, device), lengths),
        position_ids=to_device(batch.position_ids, device),
    )
    mine = context_rows(batch)
    if mine is not None:
        size = parallel_state.get_context_parallel_world_size()
        inputs.packed.gathered_order = to_device(gathered_order(lengths, size), device)
        inputs.context_rows = to_device(mine, device)
    _add_objectives(inputs, batch, chunk, models or {}, targets)
    if chunk.pre_process:
        inputs.tokens = to_device(batch.tokens, device)
        pixels = {
            name: to_device(batch.pixels[name], device) if use.shared else shared_pixels(batch, name)
            for name, use in chunk.views.items()
        }
        inputs.visual = VisualInputs(
            pixels, batch.image_grids
        )  # grids stay on the host, which needs them for sizes
        inputs.image_rows = to_device(image_rows(batch.image_starts, batch.image_rows), device)
    if chunk.post_process:
        labels = batch.labels if mine is None else batch.labels[mine]
        rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
        inputs.output_rows = to_device(rows, device)
        inputs.labels = to_device(labels[rows], device)
    return inputs


def _add_objectives(
    inputs: ModelInputs,
    batch: PackedBatch,
    chunk: VisionLanguageModel,
    models: TargetModels,
    targets: Targets | None,
) -> None:
    """Add the inputs of objectives: rows of intermediate features and, on the last stage, the inputs of the heads."""
    rows = {
        objective.name: objective.rows(batch, chunk.config.sequence_parallel)
        for objective in chunk.objectives
        if objective.features is not None or chunk.post_process
    }
    for objective in chunk.objectives:
        mine = rows.get(objective.name)
        if objective.features is None or mine is None:
            continue
        inputs.packed.feature_rows = mine.rows
        if not chunk.config.variable_seq_lengths and not chunk.post_process:
            mine.rows.stream_rows = rows_sent(chunk, len(batch.tokens))
    if not chunk.post_process or not chunk.objectives:
        return
    if targets is None:
        targets = pack_targets(models, batch)
    for objective in chunk.objectives:
        given = objective.inputs(batch, rows[objective.name], targets.get(objective.name))
        if given is not None:
            inputs.heads[objective.name] = given


def image_rows(image_starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Rows of the pack that images fill, image after image.

    Args:
        image_starts: int64 [I], first row of each image.
        counts: int64 [I], rows of each image.

    Returns:
        int64 [V], V = sum of `counts`.
    """
    # Position in the concatenation of all images, shifted by each image's offset in the pack.
    offsets = image_starts - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + offsets.repeat_interleave(counts)


def shared_pixels(batch: PackedBatch, view: str) -> torch.Tensor:
    """A view of all images of a pack, decoded on the first of the ranks that share it and sent to the others.

    Returns:
        uint8 of `batch.pixel_shapes[view]`, on the device. Collective over these ranks, unless it is empty.
    """
    device, shape = accelerator().device, batch.pixel_shapes[view]
    if view in batch.pixels:
        pixels = to_device(batch.pixels[view], device)
    else:
        pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    if parallel_state.get_tensor_and_context_parallel_world_size() > 1 and shape[0]:
        torch.distributed.broadcast(
            pixels, group=parallel_state.get_tensor_and_context_parallel_group(), group_src=0
        )
    return pixels
