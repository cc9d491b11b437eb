"""The run that trains a vision tower alone: `megatron_eve.train_tower`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from megatron.core import parallel_state

from megatron_eve.checkpoint.store import path_of_pretrained
from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.pairs import PairLoader, PairStep, long_texts
from megatron_eve.models.registry import tower_family
from megatron_eve.models.tower_family import TEXT_PAD, TowerFamily
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.phases import phase
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.runtime.transfer import to_device
from megatron_eve.training.loop.data import RunData, open_run_decoder
from megatron_eve.training.loop.optimizer import build_optimizer
from megatron_eve.training.loop.run import Run
from megatron_eve.training.loop.start import resume, start_with_data
from megatron_eve.training.loop.step_result import StepResult, Values
from megatron_eve.training.loop.targets import shared_fingerprint
from megatron_eve.training.monitoring.memory import checkpoint_bytes
from megatron_eve.training.monitoring.startup_report import (
    count_parameters,
    memory_and_samples,
    print_settings,
)
from megatron_eve.training.tower.evaluation import evaluate
from megatron_eve.training.tower.networks import TowerNetworks, wrap_networks
from megatron_eve.training.tower.sheet import sheet_path, write_sheet
from megatron_eve.training.tower.step import TowerBatch, train_step


@dataclass
class TowerRun(Run):
    """See `Run`.

    Attributes:
        networks: the tower, and what its losses need.
        settings: which losses there are.
        pair_flops: FLOPs of one pair after so many iterations; they are worked out once.
    """

    loader: PairLoader
    networks: TowerNetworks
    settings: TowerTraining
    pair_flops: Callable[[int], float]

    def train_step(self, step: PairStep) -> StepResult:
        """See `Run.train_step`."""
        config, done, device = self.config, self.train_state, accelerator().device
        pairs = step.batch()
        return train_step(
            self.networks,
            self.optimizer,
            self.settings,
            TowerBatch(
                pixels=to_device(pairs.pixels, device),
                tokens=to_device(pairs.tokens, device),
                total=len(step.sample_ids),
                iteration=done.iteration,
                seed=config.training.seed,
            ),
            recent=done.recent,
            spike_factor=config.faults.spike_factor,
        )

    def flops(self, step: PairStep) -> float:
        """See `Run.flops`."""
        begun = self.train_state.iteration >= self.settings.gan_start
        pair = self.pair_flops(self.settings.gan_start if begun else 0)  # equal until then, and from then on
        return len(step.sample_ids) * pair / torch.distributed.get_world_size()

    def evaluate(self) -> dict[str, Values]:
        """See `Run.evaluate`."""
        data, save, sheet = self.data, self.config.checkpoint.save, None
        if save and data.held_out and torch.distributed.get_rank() == 0:
            path = sheet_path(save, self.train_state.iteration)
            sheet = partial(write_sheet, path, self.networks.tower, data.dataset, self.loader, data.held_out)
        return evaluate(self.config, self.networks, self.settings, self.loader, data.held_out, sheet)

    def report(self) -> int:
        """See `Run.report`."""
        config = self.config
        total, trained = count_parameters(self.chunks)
        ranks = parallel_state.get_data_parallel_world_size()
        print_rank_0(
            f"vision tower on {accelerator().name}: DP {ranks}, {total:,} parameters on each rank, {trained:,} train\n"
            f"{memory_and_samples(self, self.networks.other_bytes())}"
        )
        length = _family(config).pair_sizes(config).text_length
        if cut := long_texts(self.data.dataset, length):
            print_rank_0(
                f"warning: {cut:,} of {len(self.data.dataset):,} texts have more than {length} tokens and are cut"
            )
        print_settings(self)
        return checkpoint_bytes(total, trained, config.training.bf16)


def setup(config: RunConfig) -> TowerRun:
    """Build tower, optimizers, schedule and data, and load what `--load` or `--pretrained-checkpoint` name.

    The process groups exist already. Data is opened first, since mistakes there are found fastest.
    """
    family, settings = _family(config), config.vision
    assert isinstance(settings, TowerTraining)
    data = start_with_data(config)
    loader = build_loader(config, data)
    with phase("loading the network of the perceptual loss"):
        perceptual, frozen = family.perceptual(config), shared_fingerprint(config)
    with phase("building the tower"):
        tower = family.tower(config, path_of_pretrained(config.checkpoint))
        networks = wrap_networks(config, tower, perceptual, settings)
    with phase("building the optimizers"):
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
    chunks = list(networks.chunks)
    train_state, scheduler = resume(config, chunks, optimizer, data, frozen)
    return TowerRun(
        config=config,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        data=data,
        train_state=train_state,
        frozen=frozen,
        stragglers=None,
        networks=networks,
        settings=settings,
        # It reads the SigLIP's config.json.
        pair_flops=cache(partial(family.pair_flops, config)),
    )


def build_loader(config: RunConfig, data: RunData) -> PairLoader:
    """This rank's loader."""
    sizes = _family(config).pair_sizes(config)
    return PairLoader(
        data.dataset,
        data.order,
        global_batch_size=config.training.global_batch_size,
        rank=parallel_state.get_data_parallel_rank(),
        ranks=parallel_state.get_data_parallel_world_size(),
        view=sizes.view,
        text_length=sizes.text_length,
        pad=TEXT_PAD,
        decoder=open_run_decoder(config, data),
    )


def _family(config: RunConfig) -> TowerFamily:
    family = tower_family(config.family)
    assert family is not None, f"the family {config.family} trains no tower"
    return family
