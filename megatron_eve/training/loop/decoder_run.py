"""The run that trains a decoder with its front end and its objectives: `megatron_eve.pretrain`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_eve.checkpoint.state import load_weights
from megatron_eve.checkpoint.store import path_of_pretrained
from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.loader import Step, StepLoader
from megatron_eve.models.build import build_chunks
from megatron_eve.runtime.phases import phase
from megatron_eve.training.loop.data import build_loader
from megatron_eve.training.loop.dropout import seed_dropout
from megatron_eve.training.loop.evaluation import evaluate
from megatron_eve.training.loop.loss import Normalizer, objectives_of
from megatron_eve.training.loop.optimizer import build_optimizer
from megatron_eve.training.loop.run import Run
from megatron_eve.training.loop.start import resume, start_with_data
from megatron_eve.training.loop.step import train_step
from megatron_eve.training.loop.step_result import StepResult, Values
from megatron_eve.training.loop.targets import TargetModels, build_target_models, shared_fingerprint
from megatron_eve.training.loop.wrap import wrap_for_training
from megatron_eve.training.monitoring.flops import model_flops, step_work
from megatron_eve.training.monitoring.memory import checkpoint_bytes
from megatron_eve.training.monitoring.startup_report import count_parameters, print_startup_report
from megatron_eve.training.monitoring.stragglers import Stragglers


@dataclass
class DecoderRun(Run):
    """See `Run`.

    Attributes:
        target_models: by objective, on ranks of the last stage.
    """

    loader: StepLoader
    target_models: TargetModels

    def train_step(self, step: Step) -> StepResult:
        """See `Run.train_step`."""
        config, done = self.config, self.train_state
        return train_step(
            self.chunks,
            self.optimizer,
            step,
            Normalizer.of(step, objectives_of(config), config.training.loss_normalization),
            self.target_models,
            recent=done.recent,
            spike_factor=config.faults.spike_factor,
            stragglers=self.stragglers,
            seed=partial(seed_dropout, config, done.consumed_samples),
        )

    def flops(self, step: Step) -> float:
        """See `Run.flops`."""
        parts = model_flops(self.config, step_work(self.data.dataset, step.sample_ids))
        return sum(parts.values()) / torch.distributed.get_world_size()

    def evaluate(self) -> dict[str, Values]:
        """See `Run.evaluate`."""
        return evaluate(self.config, self.chunks, self.loader, self.data.held_out, self.target_models)

    def report(self) -> int:
        """See `Run.report`."""
        total, trained = count_parameters(self.chunks)
        print_startup_report(self, total, trained)
        return checkpoint_bytes(total, trained, self.config.training.bf16)


def setup(config: RunConfig) -> DecoderRun:
    """Build model, optimizer, schedule and data, and load what `--load` or `--pretrained-checkpoint` name.

    The process groups exist already. Data is opened first, since mistakes there are found fastest.
    """
    data = start_with_data(config)
    loader = build_loader(config, data)
    with phase("loading target models"):
        models, frozen = build_target_models(config), shared_fingerprint(config)
    with phase("building the model"):
        bare = build_chunks(config)
    if pretrained := path_of_pretrained(config.checkpoint):
        with phase(f"loading weights from {pretrained}"):
            load_pretrained(str(pretrained), bare, config)
    else:
        from megatron_eve.checkpoint.hf.load import load_part_folders

        load_part_folders(bare, config)
    with phase("building the optimizer"):
        chunks = wrap_for_training(config, bare)
        optimizer = build_optimizer(config, chunks)
    train_state, scheduler = resume(config, chunks, optimizer, data, frozen)
    return DecoderRun(
        config=config,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        data=data,
        train_state=train_state,
        frozen=frozen,
        stragglers=Stragglers() if config.logging.log_straggler else None,
        target_models=models,
    )


def load_pretrained(folder: str, chunks: list[Any], config: RunConfig) -> None:
    """Load weights alone, from a checkpoint folder or from one in the published Hugging Face layout."""
    if (Path(folder) / "config.json").exists():
        from megatron_eve.checkpoint.hf.load import load_hf_weights

        load_hf_weights(Path(folder), chunks, config)
    else:
        load_weights(folder, chunks, config)
