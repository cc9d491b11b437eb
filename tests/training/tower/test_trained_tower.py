"""A tower that was trained has the codes that it had in training, for everything that reads towers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.convert.test_conversion import convert
from tests.ranks import RankPool
from tests.training.tower.towers import PAIRS, SEED, SIGLIP, STEPS, pairs, run_config, write_siglip

pytestmark = pytest.mark.distributed

PICTURES, AT_ONCE = 1000, 250


def many_pictures() -> torch.Tensor:
    """uint8 [PICTURES, 32, 32, 3]."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(PICTURES, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    return smooth.mul(255).byte().permute(0, 2, 3, 1).contiguous()


def trained_codes(siglip: str, folder: str, bf16: bool) -> torch.Tensor:
    """Runs on each rank: trains a tower for a few steps and saves it; the codes of `many_pictures` by the tower in
    training."""
    from megatron.core import parallel_state

    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.checkpoint.state import TrainState
    from megatron_eve.config.schema import CheckpointConfig
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.towers.perceptual import random_perceptual
    from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
    from megatron_eve.training.faults.bad_steps import start_rerun_machine
    from megatron_eve.training.loop.optimizer import build_optimizer
    from megatron_eve.training.tower.networks import wrap_networks
    from megatron_eve.training.tower.step import TowerBatch, train_step

    vision = TowerConfig(
        vision_tower=siglip,
        gan_start=1,
        visual_codebook_size=48,
        codes_per_position=3,
        decoder_multipliers=(1, 1, 1, 2),
    )
    config = run_config(sharded=True, bf16=bf16)
    config = replace(config, vision=vision, checkpoint=replace(CheckpointConfig(), save=folder))
    with model_parallel(config):
        start_rerun_machine(config.faults)
        tower = VILAUTrainableTower(tower_settings(vision), SIGLIP["text_config"], bf16=bf16)
        networks = wrap_networks(config, tower, random_perceptual(0, 4), vision)
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = slice(PAIRS * rank // size, PAIRS * (rank + 1) // size)
        for iteration in range(STEPS):
            pixels, tokens = pairs(iteration)
            batch = TowerBatch(pixels[mine], tokens[mine], PAIRS, iteration, SEED)
            assert train_step(networks, optimizer, vision, batch).bad is None
        saver = CheckpointSaver(config)
        saver.save(TrainState(STEPS, STEPS * PAIRS), list(networks.chunks), optimizer, {}, None)
        saver.finish()
        with torch.no_grad():
            parts = many_pictures().split(AT_ONCE)
            return torch.cat([tower.quantizer.encode(tower.features(part)) for part in parts])


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_codes_are_those_of_training_everywhere(ranks: RankPool, tmp_path: Path, bf16: bool) -> None:
    from transformers import AutoModel

    import megatron_eve.hf  # noqa: F401
    from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
    from megatron_eve.models.vila_u.tower import load_tower
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder

    siglip, saved = str(write_siglip(tmp_path / "siglip")), tmp_path / "saved"
    codes, other = ranks.run(2, trained_codes, siglip, str(saved), bf16)
    assert torch.equal(codes, other)
    assert codes.shape == (PICTURES, 4, 4, 3) and len(codes.unique()) > 20
    dtype = torch.bfloat16 if bf16 else torch.float32
    tower = load_tower(read_tower_folder(saved), torch.device("cpu"), dtype)
    parts = many_pictures().split(AT_ONCE)
    assert torch.equal(torch.cat([tower.encode(part) for part in parts]), codes)
    out, name = tmp_path / "exported", str(dtype).removeprefix("torch.")
    words = ("--format", "transformers", "--dtype", name)
    assert convert("export", "--source", saved, "--target", out, *words) == 0
    model = AutoModel.from_pretrained(out, dtype=dtype).eval()
    values = [part.float().div(255).sub(0.5).div(0.5).permute(0, 3, 1, 2) for part in parts]
    assert torch.equal(torch.cat([model.encode(some) for some in values]), codes)
    # A published folder, and a checkpoint of that, are the same tower.
    published, again = tmp_path / "published", tmp_path / "again"
    assert convert("export", "--source", saved, "--target", published) == 0
    assert convert("import", "--source", published, "--target", again, "--siglip-config", siglip) == 0
    digests = {IMAGE_CODES.sha256(read_tower_folder(folder)) for folder in (saved, again)}
    assert len(digests) == 1
