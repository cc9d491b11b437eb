"""A small tower, its pairs, and a few of its steps on ranks."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_eve.config import RunConfig
from megatron_eve.config.schema import OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.vila_u.tower_folder import encoder_sizes
from megatron_eve.models.vila_u.tower_settings import DecoderSizes, TowerSettings

SIGLIP: dict[str, Any] = {
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    },
    "text_config": {
        "model_type": "siglip_text_model", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 8, "bos_token_id": None,
        "eos_token_id": None,
    },
}  # fmt: skip
PAIRS, STEPS, SEED, LR = 6, 3, 5, 1e-3


@dataclass(frozen=True)
class Case:
    """A tower and how it is trained.

    Attributes:
        codes: K; 96 vectors are in a batch.
        shared: one codebook for all depths.
        resized: the pixel decoder reads a grid of 2 x 2 instead of 4 x 4, as that of 384 pixels reads another one.
        training: weights of the losses.
    """

    codes: int = 40
    shared: bool = True
    resized: bool = False
    training: TowerTraining = field(default_factory=TowerTraining)

    @property
    def settings(self) -> TowerSettings:
        """What the tower is built from."""
        levels = (1, 1, 1, 1, 2) if self.resized else (1, 1, 1, 2)
        return TowerSettings(
            folder=Path("/nowhere"),
            encoder=encoder_sizes("", SIGLIP),
            decoder=DecoderSizes(32, levels, 1, (4,), 32, 32, 3),
            latent_shape=(4, 4, 32),
            code_shape=(4, 4, 3),
            codebook_sizes=(self.codes,) * 3,
            shared_codebook=self.shared,
            decoder_latent_shape=(2, 2) if self.resized else None,
        )


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [PAIRS, 32, 32, 3] and texts int64 [PAIRS, 8]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(PAIRS, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    tokens = torch.randint(2, 96, (PAIRS, 8), generator=generator)
    tokens[:, 5:] = 1
    return smooth.mul(255).byte().permute(0, 2, 3, 1).contiguous(), tokens


def run_config(sharded: bool = False, bf16: bool = False) -> RunConfig:
    """Of a run with RQ-VAE's optimizer."""
    return RunConfig(
        family="vila_u_tower",
        training=TrainingConfig(global_batch_size=PAIRS, train_iters=STEPS, seed=SEED, bf16=bf16),
        optimizer=replace(
            OptimizerConfig(),
            lr=LR,
            min_lr=LR,
            adam_beta1=0.5,
            adam_beta2=0.9,
            weight_decay=0.0,
            clip_grad=0.0,
        ),
        parallel=replace(ParallelConfig(), use_distributed_optimizer=sharded),
    )


def write_siglip(folder: Path, text: bool = True) -> Path:
    """config.json of the SigLIP."""
    folder.mkdir()
    fields = copy.deepcopy(SIGLIP)
    if not text:
        del fields["text_config"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def few_steps(case: Case, slices: list[int], mutation: str | None = None) -> dict[str, Any]:
    """Runs on each rank, in float64: losses, gradients and buffers of some steps, and all weights before them.

    With a mistake in it, one step: that must be enough to notice it.
    """
    from megatron.core import parallel_state

    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.towers.perceptual import random_perceptual
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
    from megatron_eve.training.faults.bad_steps import start_rerun_machine
    from megatron_eve.training.loop.optimizer import build_optimizer
    from megatron_eve.training.tower.networks import wrap_networks
    from megatron_eve.training.tower.step import TowerBatch, train_step
    from tests.training.tower.mutations import MUTATIONS

    config = run_config()
    with model_parallel(config), ExitStack() as stack:
        start_rerun_machine(config.faults)
        tower = VILAUTrainableTower(case.settings, SIGLIP["text_config"]).double()
        networks = wrap_networks(config, tower, random_perceptual(0, 4), case.training)
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
        start = [{n: t.clone() for n, t in unwrap(chunk).state_dict().items()} for chunk in networks.chunks]
        for place, value in MUTATIONS[mutation] if mutation else ():
            stack.enter_context(mock.patch(place, value))
        rank = parallel_state.get_data_parallel_rank()
        mine = slice(sum(slices[:rank]), sum(slices[: rank + 1]))
        steps = []
        for iteration in range(1 if mutation else STEPS):
            pixels, tokens = pairs(iteration)
            batch = TowerBatch(pixels[mine], tokens[mine], PAIRS, iteration, SEED)
            result = train_step(networks, optimizer, case.training, batch)
            assert result.bad is None and not result.exit_code
            gradients = {
                name: parameter.main_grad.clone()
                for chunk in networks.chunks
                for name, parameter in unwrap(chunk).named_parameters()
                if parameter.requires_grad
            }
            steps.append(({**result.values, **result.figures}, gradients))
        buffers = {
            name: buffer.clone()
            for chunk in networks.chunks
            for name, buffer in unwrap(chunk).named_buffers(remove_duplicate=True)
        }
    return {"start": start, "steps": steps, "buffers": buffers}


def bad_step(case: Case) -> tuple[list[str], str | None]:
    """Runs on each rank: names of the tensors that a bad step has changed, and why it is bad."""
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
    from megatron_eve.training.faults.bad_steps import MIN_STEPS, start_rerun_machine
    from megatron_eve.training.loop.optimizer import build_optimizer
    from megatron_eve.training.tower.networks import wrap_networks
    from megatron_eve.training.tower.step import TowerBatch, train_step

    config = run_config()
    with model_parallel(config):
        start_rerun_machine(config.faults)
        tower = VILAUTrainableTower(case.settings, SIGLIP["text_config"])
        networks = wrap_networks(config, tower, None, case.training)
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
        state = {n: t for chunk in networks.chunks for n, t in unwrap(chunk).state_dict().items()}
        before = {name: tensor.clone() for name, tensor in state.items()}
        recent = [{"reconstruction loss": 1e-6}] * MIN_STEPS
        batch = TowerBatch(*pairs(), PAIRS, 0, SEED)
        result = train_step(networks, optimizer, case.training, batch, recent=recent, spike_factor=2)
        return [name for name in state if not torch.equal(state[name], before[name])], result.bad
