"""Golden cases of training: the first steps of a published trainer, under any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.checkpoint.hf.load import global_parameters, load_hf_weights
from megatron_eve.config import OptimizerConfig, ParallelConfig, RunConfig, validate
from megatron_eve.data.schema import ImageFile, Kind, Record
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import load_tokenizer
from megatron_eve.data.text.templates import find_template
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.build import build_chunks
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.family import ModelFamily
from megatron_eve.models.golden_format import GoldenRow, GoldenSteps
from megatron_eve.models.process_groups import model_parallel
from megatron_eve.models.text_format import IMAGE_TOKEN
from megatron_eve.training.loop.data import build_loader, data_in_memory
from megatron_eve.training.loop.loss import Normalizer, objectives_of
from megatron_eve.training.loop.optimizer import build_optimizer, build_scheduler
from megatron_eve.training.loop.step import train_step
from megatron_eve.training.loop.targets import build_target_models
from megatron_eve.training.loop.wrap import wrap_for_training
from megatron_eve.verification.case_run import CaseDataset, case_config
from megatron_eve.verification.cases import ModelCase
from megatron_eve.verification.model_cases import whole_tensors
from megatron_eve.verification.results import (
    ACTIVATIONS,
    GRADIENTS,
    LOSSES,
    CheckResult,
    absolute,
    equal,
    relative,
)

# Of the norm of what steps changed in a parameter; an epsilon of 1e-6 for 1e-8 changes it by 3e-4.
CHANGES = 1e-4


def check_steps(
    family: ModelFamily, folder: Path, parallel: ParallelConfig, recompute: bool
) -> Iterator[CheckResult]:
    """Take the steps of a case with a run's own loader, losses, optimizer and schedule, and compare. Collective.

    Args:
        family: whose golden cases have the form of this folder.
        folder: the case.
        parallel: the layout.
        recompute: with full recomputation.
    """
    for golden in family.golden().steps(folder):
        case = _model_case(golden, folder, family)
        config = case_config(case, parallel, recompute)
        config = replace(
            config,
            parallel=replace(config.parallel, use_distributed_optimizer=parallel.use_distributed_optimizer),
            training=replace(config.training, train_iters=len(golden.losses)),
            optimizer=OptimizerConfig(lr_decay_style="constant", lr_warmup_fraction=0.0, **golden.optimizer),
        )
        validate(config, torch.distributed.get_world_size())
        with model_parallel(config):
            for row in _taken(golden, case, config):
                yield replace(row, name=f"{golden.name}.{row.name}")


def _taken(golden: GoldenSteps, case: ModelCase, config: RunConfig) -> Iterator[CheckResult]:
    bare = build_chunks(config)
    load_hf_weights(case.hf, bare, config)
    chunks = wrap_for_training(config, bare)
    optimizer = build_optimizer(config, chunks)
    scheduler = build_scheduler(config, optimizer)
    scheduler.step(increment=0)
    models = build_target_models(config)
    before = _weights(bare, case)
    loader = build_loader(config, data_in_memory(config, CaseDataset(case)))
    step = loader.step(0)
    normalizer = Normalizer.of(step, objectives_of(config))
    for number, (loss, norm) in enumerate(zip(golden.losses, golden.grad_norms, strict=True)):
        result = train_step(chunks, optimizer, step, normalizer, models)
        scheduler.step(increment=config.training.global_batch_size)
        yield absolute(f"loss.{number}", result.losses[NextToken.name], loss, LOSSES)
        yield absolute(f"grad_norm.{number}", result.grad_norm / norm, 1.0, GRADIENTS)
    loader.close()
    after = _weights(bare, case)
    changes = {key: float((after[key].double() - before[key].double()).norm()) for key in after}
    moved = {key for key, change in changes.items() if change > 0}
    yield equal("parameters that change", len(moved ^ set(golden.changes)))
    for key, change in golden.changes.items():
        yield absolute(f"change.{key}", changes[key] / change, 1.0, CHANGES)
    for key, tensor in golden.final.items():
        yield relative(f"final.{key}", after[key], tensor, ACTIVATIONS)


def _weights(chunks: Sequence[VisionLanguageModel], case: ModelCase) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole, by Hugging Face name. Collective."""
    shards = (
        (name, parameter.detach().clone(), padded) for name, parameter, padded in global_parameters(chunks)
    )
    return whole_tensors(shards, case)


def _model_case(golden: GoldenSteps, folder: Path, family: ModelFamily) -> ModelCase:
    settings, rules = settings_of(golden.weights), family.text_rules
    tokenizer = load_tokenizer(golden.weights, rules.tokenizer_legacy, rules.added_tokens)
    encoded = [_encoded(row, tokenizer) for row in golden.samples]
    ids, labels = (
        pad_sequence([torch.tensor(values) for values in some], batch_first=True, padding_value=IGNORE_INDEX)
        for some in zip(*encoded, strict=True)
    )
    mask = pad_sequence(
        [torch.ones(len(tokens), dtype=torch.bool) for tokens, _ in encoded], batch_first=True
    )
    return ModelCase(
        name=golden.name,
        folder=folder,
        inputs={"input_ids": ids, "labels": labels, "attention_mask": mask},
        outputs={},
        hf=golden.weights,
        family=settings.family,
        model=settings.model,
        vision=settings.vision,
        images=golden.pictures,
        stage=golden.stage,
    )


def _encoded(row: GoldenRow, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of a row. Published code takes captions without a picture; preprocessing leaves them out here."""
    is_caption = row.pictures == 0 and not find_template(row.template).is_conversation
    question, *answers = row.turns
    turns = [{**question, "value": IMAGE_TOKEN}, *answers] if is_caption else row.turns
    pictures = [ImageFile(b"")] * (1 if is_caption else row.pictures)
    encoded = encode_record(
        Record(row.name, "", cast(Kind, row.kind), pictures, turns), tokenizer, row.template
    )
    kept = [
        place for place, token in enumerate(encoded.tokens) if not (is_caption and token == IMAGE_TOKEN_ID)
    ]
    return [encoded.tokens[place] for place in kept], [encoded.labels[place] for place in kept]
