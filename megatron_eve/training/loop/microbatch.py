"""From a `PackedBatch` of the loader to the model's inputs on this rank.

Every rank knows a pack's shapes from the manifest. On the first stage one of the ranks that share a pack decodes
its pictures and sends the pixels to the others, or each decodes its share; the last stage does the same for the
pictures of target models (`ModelFamily.views`). Pixels never travel between stages. Codes of pictures do not travel at
all: each rank of these stages reads them from the dataset.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.batch import PackedBatch
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.decoder.context_parallel import gathered_order
from megatron_eve.models.decoder.expert_rows import ExpertRows, expert_rows
from megatron_eve.models.decoder.model import ModelInputs, VisionLanguageModel
from megatron_eve.models.decoder.pack_rows import context_rows
from megatron_eve.models.decoder.packed import PackedParams, packed_params
from megatron_eve.models.model_parts import FamilyObjective, ImageShare, PackRows, VisualInputs
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


def reads_codes(config: RunConfig) -> bool:
    """Does this rank's loader read codes of images? On the first and the last pipeline stage, if the family does."""
    ends = parallel_state.is_pipeline_first_stage(
        ignore_virtual=True
    ) or parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    return ends and find_family(config.family).reads_codes


def image_share() -> ImageShare:
    """This rank's share of the images of a pack, if the ranks of a stage share them."""
    return ImageShare(
        parallel_state.get_tensor_and_context_parallel_rank(),
        parallel_state.get_tensor_and_context_parallel_world_size(),
    )


class DevicePack:
    """A pack, and what all model chunks of a rank need of it: computed and moved to the device once, when first used.

    What one chunk alone needs (tokens and pixels on the first stage, labels and targets on the last) is not kept here.
    """

    def __init__(self, batch: PackedBatch, targets: Targets | None = None) -> None:
        """A pack on the host, and its targets if the target models have seen it already (see `prefetch_targets`)."""
        self.batch = batch
        self.targets = targets
        self._rows: dict[str, PackRows | None] = {}
        self._expert_rows: ExpertRows | None = None

    @cached_property
    def packed(self) -> PackedParams:
        """Where samples begin and end; without `feature_rows`, which a chunk adds to a copy."""
        batch, device = self.batch, accelerator().device
        lengths = batch.cu_seqlens_padded.diff().tolist()
        packed = packed_params(to_device(batch.cu_seqlens_padded, device), lengths)
        if self.rank_rows is not None:
            size = parallel_state.get_context_parallel_world_size()
            packed.gathered_order = to_device(gathered_order(lengths, size), device)
        return packed

    @cached_property
    def position_ids(self) -> torch.Tensor:
        """int64 [T], on the device."""
        return to_device(self.batch.position_ids, accelerator().device)

    @cached_property
    def rank_rows(self) -> torch.Tensor | None:
        """int64 [T / cp], rows of the pack on this context-parallel rank, on the host; None where it has all."""
        return context_rows(self.batch)

    @cached_property
    def context_rows(self) -> torch.Tensor | None:
        """The same on the device."""
        return None if self.rank_rows is None else to_device(self.rank_rows, accelerator().device)

    def expert_rows(self, sequence_parallel: bool) -> ExpertRows:
        """Rows of text and of images in a decoder with experts."""
        if self._expert_rows is None:
            self._expert_rows = self._sorted_rows(sequence_parallel)
        return self._expert_rows

    def _sorted_rows(self, sequence_parallel: bool) -> ExpertRows:
        batch = self.batch
        is_visual = torch.zeros(len(batch.tokens), dtype=torch.bool)
        is_visual[image_rows(batch.image_starts, batch.image_rows)] = True
        if self.rank_rows is not None:
            is_visual = is_visual[self.rank_rows]
        share = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        rows = expert_rows(is_visual, *(share if sequence_parallel else ()))
        device = accelerator().device
        return replace(rows, order=to_device(rows.order, device), place=to_device(rows.place, device))

    def rows(self, objective: FamilyObjective, sequence_parallel: bool) -> PackRows | None:
        """What `FamilyObjective.rows` gives for the pack."""
        if objective.name not in self._rows:
            self._rows[objective.name] = objective.rows(self.batch, sequence_parallel)
        return self._rows[objective.name]


def pack_iterators(packs: Iterator[DevicePack], chunks: int) -> list[Iterator[DevicePack]]:
    """An iterator for each model chunk of a rank, all over the same packs.

    The interleaved schedule asks the iterator of the chunk that it runs. A pack is taken from `packs` when the first
    chunk asks for it, and let go when the last one has it (`itertools.tee` would keep dozens).
    """
    waiting: list[deque[DevicePack]] = [deque() for _ in range(chunks)]

    def take() -> bool:
        for pack in packs:
            for queue in waiting:
                queue.append(pack)
            return True
        return False

    def packs_of(queue: deque[DevicePack]) -> Iterator[DevicePack]:
        while queue or take():
            yield queue.popleft()

    return [packs_of(queue) for queue in waiting]


def model_inputs(
    pack: DevicePack, chunk: VisionLanguageModel, models: TargetModels | None = None
) -> ModelInputs:
    """What a model chunk needs of a pack, on the device.

    Rows with labels are selected here, on the host, so that the host never waits for a count from the device.

    Args:
        pack: shared by the model chunks of this rank.
        chunk: its position in the pipeline decides which inputs it needs.
        models: target models by objective; an objective without its target model is not computed.
    """
    device, batch = accelerator().device, pack.batch
    inputs = ModelInputs(
        packed=replace(pack.packed), position_ids=pack.position_ids, context_rows=pack.context_rows
    )
    if chunk.has_experts:
        inputs.packed.expert_rows = pack.expert_rows(chunk.config.sequence_parallel)
    _add_objectives(inputs, pack, chunk, models or {})
    if chunk.pre_process:
        inputs.tokens = to_device(batch.tokens, device)
        pixels = {
            name: to_device(batch.pixels[name], device) if use.shared else shared_pixels(batch, name)
            for name, use in chunk.views.items()
        }
        codes = None if batch.codes is None else to_device(batch.codes, device)
        # Grids stay on the host, which needs them for sizes.
        inputs.visual = VisualInputs(pixels, batch.image_grids, codes)
        inputs.image_rows = to_device(image_rows(batch.image_starts, batch.image_rows), device)
    if chunk.post_process:
        labels = batch.labels if pack.rank_rows is None else batch.labels[pack.rank_rows]
        rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
        inputs.output_rows = to_device(rows, device)
        inputs.labels = to_device(labels[rows], device)
    return inputs


def _add_objectives(
    inputs: ModelInputs, pack: DevicePack, chunk: VisionLanguageModel, models: TargetModels
) -> None:
    """Add the inputs of objectives: rows of intermediate features and, on the last stage, the inputs of the heads."""
    batch, sequence_parallel = pack.batch, chunk.config.sequence_parallel
    for objective in chunk.objectives:
        rows = pack.rows(objective, sequence_parallel) if objective.features is not None else None
        if rows is None:
            continue
        # A copy: the last chunk's stream is as long as it has to be, that of chunks before it may be of a fixed length.
        inputs.packed.feature_rows = feature_rows = replace(rows.rows)
        if not chunk.config.variable_seq_lengths and not chunk.post_process:
            feature_rows.stream_rows = rows_sent(chunk, len(batch.tokens))
    if not chunk.post_process or not chunk.objectives:
        return
    targets = pack_targets(models, batch) if pack.targets is None else pack.targets
    for objective in chunk.objectives:
        given = objective.inputs(batch, pack.rows(objective, sequence_parallel), targets.get(objective.name))
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
