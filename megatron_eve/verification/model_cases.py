"""Golden cases that need the model: embeddings, logits, loss and gradients, under any layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_eve.checkpoint.hf.load import global_parameters, load_hf_weights
from megatron_eve.checkpoint.hf.rules import to_hf
from megatron_eve.config import (
    ParallelConfig,
    RunConfig,
    validate,
)
from megatron_eve.data.batch import PADDING_SAMPLE_ID, PackedBatch
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.build import build_chunks, unwrap
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.family import ModelSettings
from megatron_eve.models.golden_format import GoldenFormat, image_names
from megatron_eve.models.process_groups import model_parallel
from megatron_eve.models.registry import find_family
from megatron_eve.models.tensor_layouts import Sizes
from megatron_eve.training.loop.data import build_loader, data_in_memory
from megatron_eve.training.loop.loss import Normalizer, objectives_of
from megatron_eve.training.loop.microbatch import DevicePack, model_inputs, pack_iterators
from megatron_eve.training.loop.step import forward_backward
from megatron_eve.training.loop.targets import TargetModels, build_target_models
from megatron_eve.training.loop.wrap import wrap_for_training
from megatron_eve.verification.case_run import CaseDataset, case_config
from megatron_eve.verification.cases import ModelCase, check_pictures
from megatron_eve.verification.gradients import check_gradients
from megatron_eve.verification.results import (
    ACTIVATIONS,
    LOSSES,
    CheckResult,
    absolute,
    compared,
    equal,
    gathered,
    relative,
)


def check_model_case(case: ModelCase, parallel: ParallelConfig, recompute: bool = False) -> list[CheckResult]:
    """Run one case under a layout, in the existing process group. Collective; every rank gets all rows."""
    config = case_config(case, parallel, recompute)
    validate(config, torch.distributed.get_world_size())
    with model_parallel(config):
        rows = _check_under_layout(case, config)
    return [replace(row, name=f"{case.name}.{row.name}") for row in rows] if case.name else rows


def check_comparisons(folder: Path, golden: GoldenFormat, parallel: ParallelConfig) -> list[CheckResult]:
    """What a family compares by itself, under the tensor parallelism of a layout; likewise."""
    config = RunConfig(
        parallel=ParallelConfig(tensor_model_parallel_size=parallel.tensor_model_parallel_size),
    )
    with model_parallel(config):
        return gathered([compared(one) for one in golden.comparisons(folder)])


def _check_under_layout(case: ModelCase, config: RunConfig) -> list[CheckResult]:
    bare = build_chunks(config)
    load_hf_weights(case.hf, bare, config)
    chunks = wrap_for_training(config, bare)
    models = build_target_models(config)
    loader = build_loader(config, data_in_memory(config, CaseDataset(case)))
    step = loader.step(0)
    rows = list(check_pictures(case, config))
    rows += gathered(list(_check_labels(case, step.batches)))
    rows += gathered(_check_embeddings(case, bare[0], step.batches))
    outputs = _forward(case, chunks, step.batches, models)
    objectives = {objective.name for objective in find_family(case.family).objectives(config)}
    for sample in range(len(case.images)):
        rows += _compare_logits(case, sample, outputs["logits", sample][:, : case.model.vocab_size])
        for kind in (
            kind
            for objective in objectives
            for kind in find_family(case.family).golden().heads.get(objective, ())
        ):
            name = f"{kind}.{sample}"
            # Samples without an image have no rows here; the published code runs the layer on them without using the
            # result.
            if case.images[sample] and name in case.outputs:
                expected = case.outputs[name]
                rows.append(relative(name, outputs[kind, sample][: len(expected)], expected, ACTIVATIONS))
    normalizer = Normalizer.of(step, objectives_of(config))
    for chunk in chunks:
        chunk.zero_grad_buffer()
    losses = forward_backward(chunks, step, normalizer, models)
    rows += gathered(_check_losses(case, objectives, losses))
    rows += check_gradients(case, objectives, whole_gradients(bare, case))
    loader.close()
    return rows


def _check_losses(
    case: ModelCase, objectives: Collection[str], losses: dict[str, torch.Tensor]
) -> list[CheckResult]:
    """All losses and, if the run has objectives of the family, their sum; on the last stage."""
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return []
    names = {"llm_loss": NextToken.name, **find_family(case.family).golden().losses}
    rows = [
        absolute(theirs, float(losses[ours]), float(case.outputs[theirs]), LOSSES)
        for theirs, ours in names.items()
        if ours in losses and theirs in case.outputs
    ]
    if objectives:
        total = float(sum(losses.values()))
        rows.append(absolute("total_loss", total, float(case.outputs["total_loss"]), LOSSES))
    return rows


def _samples(batch: PackedBatch) -> Iterator[tuple[int, slice]]:
    """The samples of a pack and the rows of each, without padding."""
    starts, lengths = batch.cu_seqlens_padded.tolist(), batch.cu_seqlens.diff().tolist()
    for sample, start, length in zip(batch.sample_ids.tolist(), starts, lengths, strict=False):
        if sample != PADDING_SAMPLE_ID:
            yield sample, slice(start, start + length)


def _check_labels(case: ModelCase, batches: Sequence[PackedBatch]) -> Iterator[CheckResult]:
    """Labels with pictures expanded, where the case has them."""
    if (merged := case.outputs.get("labels_merged")) is None:
        return
    for batch in batches:
        for sample, place in _samples(batch):
            # Ours are shifted; the case's are as long as its longest sample.
            ours = torch.full_like(merged[sample, 1:], IGNORE_INDEX)
            ours[: place.stop - place.start - 1] = batch.labels[place][:-1]
            yield equal(f"labels_merged.{sample}", int((ours != merged[sample, 1:]).sum()))
        if batch.codes is not None and "codes_merged" in case.outputs:
            yield from _check_codes(case.outputs["codes_merged"], batch)


def _check_codes(merged: torch.Tensor, batch: PackedBatch) -> Iterator[CheckResult]:
    """Codes of the pictures that are to be drawn, at their places: [samples, L, D]."""
    assert batch.codes is not None
    depth = merged.shape[-1]
    ours = torch.full((len(batch.tokens), depth), IGNORE_INDEX)
    place = 0
    for start, rows, drawn in zip(
        batch.image_starts.tolist(), batch.image_rows.tolist(), batch.drawn.tolist(), strict=True
    ):
        if drawn:
            ours[start : start + rows] = batch.codes[place : place + rows]
        place += rows
    for sample, some in _samples(batch):
        length = some.stop - some.start
        different = int((ours[some] != merged[sample, :length]).sum())
        yield equal(f"codes_merged.{sample}", different)


@torch.no_grad()
def _check_embeddings(
    case: ModelCase, first: VisionLanguageModel, batches: Sequence[PackedBatch]
) -> list[CheckResult]:
    """Outputs inside the front end, and the decoder's input, on the first stage."""
    if not first.pre_process:
        return []
    rows, names = [], image_names([len(files) for files in case.images])
    for batch in batches:
        inputs = model_inputs(DevicePack(batch), first)
        hidden = first.embed(inputs)[:, 0]
        assert inputs.visual is not None
        inside = find_family(case.family).golden().front_end_outputs(first.vision_model, inputs.visual)
        image = 0
        for sample, place in _samples(batch):
            if "inputs_embeds" in case.outputs:
                golden = case.outputs["inputs_embeds"][sample, : place.stop - place.start]
                rows.append(relative(f"inputs_embeds.{sample}", hidden[place], golden, ACTIVATIONS))
            for name in names[sample]:
                for kind, images in inside.items():
                    if (output := f"{kind}.{name}") in case.outputs:
                        rows.append(relative(output, images[image], case.outputs[output], ACTIVATIONS))
                image += 1
    return rows


# A part of an output on one rank: name and sample, indices of the rows, and the rows.
_Piece = tuple[tuple[str, int], torch.Tensor, torch.Tensor]


@torch.no_grad()
def _forward(
    case: ModelCase, chunks: Sequence[torch.nn.Module], batches: Sequence[PackedBatch], models: TargetModels
) -> dict[tuple[str, int], torch.Tensor]:
    """Logits of every real row, predictions and targets of the objectives' heads, through the schedule. Collective.

    Returns:
        On every rank, by ("logits" or a name of `GoldenFormat.heads`, sample).
    """
    golden = find_family(case.family).golden()
    predicted: dict[str, list[torch.Tensor]] = {}
    last = unwrap(chunks[-1])
    hooks = []

    def predict(name: str, head: torch.nn.Module, given: tuple[Any, ...], _: torch.Tensor) -> None:
        predicted.setdefault(name, []).append(golden.predictions(head, given))

    for objective in last.objectives if last.post_process else ():
        if objective.module is not None:
            head = last.get_submodule(objective.module)
            hooks.append(head.register_forward_hook(partial(predict, objective.name)))

    def forward_step(packs: Iterator[DevicePack], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        chunk, pack = unwrap(model), next(packs)
        batch, inputs = pack.batch, model_inputs(pack, chunk, models)
        mine = torch.arange(len(batch.tokens)) if pack.rank_rows is None else pack.rank_rows
        inputs.labels, inputs.output_rows = None, torch.arange(len(mine))

        def collect(logits: torch.Tensor) -> tuple[torch.Tensor, list[_Piece]]:
            pieces = list(_logit_pieces(batch, mine, logits))
            for objective in chunk.objectives:
                if objective.name not in inputs.heads:
                    continue
                rows = objective.rows(batch, chunk.config.sequence_parallel)
                places = golden.row_places(rows, batch)
                predictions, targets = golden.heads[objective.name]
                pieces += _head_pieces(batch, places, predictions, predicted[objective.name].pop())
                pieces += _head_pieces(batch, places, targets, inputs.heads[objective.name].targets)
            return logits.new_zeros(()), pieces

        return model(inputs), collect

    interleaved, iterators = len(chunks) > 1, pack_iterators(map(DevicePack, batches), len(chunks))
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
    )
    for hook in hooks:
        hook.remove()
    gathered: list[list[_Piece]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, [piece for result in results for piece in result])
    parts: dict[tuple[str, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, rows, values in (piece for some in gathered for piece in some):
        parts.setdefault(name, []).append((rows, values))
    whole = {}
    for name, some in parts.items():
        values = torch.cat([value if value.is_floating_point() else value.double() for _, value in some])
        whole[name] = values.new_full(
            (int(max(r.max() for r, _ in some if len(r))) + 1, values.shape[1]), torch.nan
        )
        whole[name][torch.cat([rows for rows, _ in some])] = values
    return whole


def _logit_pieces(batch: PackedBatch, mine: torch.Tensor, logits: torch.Tensor) -> Iterator[_Piece]:
    for sample, place in _samples(batch):
        here = (mine >= place.start) & (mine < place.stop)
        yield ("logits", sample), mine[here] - place.start, logits[here.to(logits.device)].cpu()


def _head_pieces(
    batch: PackedBatch, places: tuple[torch.Tensor, torch.Tensor], name: str, values: torch.Tensor
) -> Iterator[_Piece]:
    """Rows of an objective's head, numbered within their image."""
    owners = torch.bucketize(batch.image_starts, batch.cu_seqlens_padded[1:].long(), right=True)
    images, numbers = places
    for image, owner in enumerate(owners.tolist()):
        here = images == image
        if not here.any():
            continue
        yield (name, int(batch.sample_ids[owner])), numbers[here], values[here.to(values.device)].cpu()


def _compare_logits(case: ModelCase, sample: int, logits: torch.Tensor) -> list[CheckResult]:
    logits, outputs = logits.cpu(), case.outputs
    length, rows = len(logits), list[CheckResult]()
    if "logits" in outputs:
        rows.append(relative(f"logits.{sample}", logits, outputs["logits"][sample, :length], ACTIVATIONS))
    if "logits_index" not in outputs:
        return rows
    picked = outputs["logits_index"][:, 0] == sample
    positions = outputs["logits_index"][picked, 1]
    top = logits.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-4  # with a smaller margin, rounding may change the chosen token
    same = logits.argmax(-1) == outputs["logits_argmax"][sample, :length]
    return [
        *rows,
        relative(f"logits_rows.{sample}", logits[positions], outputs["logits_rows"][picked], ACTIVATIONS),
        relative(
            f"logits_logsumexp.{sample}",
            logits.logsumexp(-1),
            outputs["logits_logsumexp"][sample, :length],
            ACTIVATIONS,
        ),
        equal(f"logits_argmax.{sample}", int((clear & ~same).sum())),
    ]


def whole_gradients(chunks: Sequence[VisionLanguageModel], case: ModelCase) -> dict[str, torch.Tensor]:
    """Gradients of all parameters under their Hugging Face names, whole, on every rank. Collective."""
    return whole_tensors(
        (
            (name, parameter.main_grad, padded)  # type: ignore[attr-defined]
            for name, parameter, padded in global_parameters(chunks)
            if parameter.requires_grad
        ),
        case,
    )


def whole_tensors(
    shards: Iterable[tuple[str, torch.Tensor, int]], settings: ModelSettings
) -> dict[str, torch.Tensor]:
    """What ranks hold of parameters, or of something of their shapes, whole by Hugging Face name. Collective.

    Args:
        shards: global name, this rank's part, and the padded vocabulary of its chunk.
        settings: of the model.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    size = parallel_state.get_tensor_model_parallel_world_size()
    mine: dict[str, torch.Tensor] = {}
    for name, shard, padded in shards:
        parts = [torch.empty_like(shard) for _ in range(size)]
        torch.distributed.all_gather(parts, shard.contiguous(), group=group)
        parts = [part.cpu() for part in parts]
        mine.update(to_hf(name, parts, Sizes.of(settings.model, padded), settings))
    gathered: list[dict[str, torch.Tensor]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    return {name: tensor for some in gathered for name, tensor in some.items()}
