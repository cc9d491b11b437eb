"""A tower that was trained: saved and loaded again with both optimizers, and read by everything that reads towers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.test_conversion import convert
from tests.ranks import RankPool
from tests.training.tower.towers import PAIRS, SEED, SIGLIP, Case, pairs, run_config, write_siglip

pytestmark = pytest.mark.distributed

STARTS = 2  # of the adversarial loss, so that the optimizers have made different numbers of updates
PICTURES = 1000


def many_pictures() -> torch.Tensor:
    """uint8 [PICTURES, 32, 32, 3]."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(PICTURES, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    return smooth.mul(255).byte().permute(0, 2, 3, 1).contiguous()


def run(siglip: str, folder: str, first: int, last: int, bf16: bool, codes: bool = False) -> dict[str, Any]:
    """Runs on each rank: iterations `first` to `last` of a run that saves at the end, and resumes where `first` is not 0.

    Returns:
        Its losses, the updates of each optimizer, and, if `codes`, the codes of `many_pictures`.
    """
    from megatron.core import parallel_state

    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.checkpoint.state import TrainState, load_checkpoint
    from megatron_eve.config.schema import CheckpointConfig
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.towers.perceptual import random_perceptual
    from megatron_eve.models.towers.tower_training import TowerTraining
    from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
    from megatron_eve.training.faults.bad_steps import start_rerun_machine
    from megatron_eve.training.loop.optimizer import build_optimizer
    from megatron_eve.training.tower.networks import wrap_networks
    from megatron_eve.training.tower.step import TowerBatch, train_step

    training = TowerTraining(gan_start=STARTS)
    vision = TowerConfig(
        vision_tower=siglip, gan_start=STARTS, visual_codebook_size=48, codes_per_position=3,
        decoder_multipliers=(1, 1, 1, 2),
    )  # fmt: skip
    config = replace(
        run_config(sharded=True, bf16=bf16),
        vision=vision,
        checkpoint=replace(CheckpointConfig(), save=folder, load=folder if first else None),
    )
    with model_parallel(config):
        start_rerun_machine(config.faults)
        tower = VILAUTrainableTower(tower_settings(vision), SIGLIP["text_config"], bf16=bf16)
        networks = wrap_networks(config, tower, random_perceptual(0, 4), training)
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
        chunks = list(networks.chunks)
        if first:
            assert load_checkpoint(config, chunks, optimizer, {}).iteration == first
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = slice(PAIRS * rank // size, PAIRS * (rank + 1) // size)
        losses = []
        for iteration in range(first, last):
            pixels, tokens = pairs(iteration)
            result = train_step(
                networks, optimizer, training, TowerBatch(pixels[mine], tokens[mine], PAIRS, iteration, SEED)
            )
            assert result.bad is None
            losses.append({**result.values, **result.figures})
        if not first:
            saver = CheckpointSaver(config)
            saver.save(TrainState(last, last * PAIRS), chunks, optimizer, {}, None)
            saver.finish()
        found: dict[str, Any] = {
            "losses": losses,
            "updates": [one.optimizer.param_groups[0]["step"] for one in optimizer.chained_optimizers],
        }
        if codes:
            with torch.no_grad():
                some = [tower.quantizer.encode(tower.features(part)) for part in many_pictures().split(250)]
            found["codes"] = torch.cat(some)
        return found


def test_a_run_resumes_where_it_stood(ranks: RankPool, tmp_path: Path) -> None:
    siglip, saved = str(write_siglip(tmp_path / "siglip")), str(tmp_path / "saved")
    first, *_ = ranks.run(2, run, siglip, saved, 0, 3, False)
    assert first["updates"] == [3, 1]
    whole, *_ = ranks.run(2, run, siglip, str(tmp_path / "whole"), 0, 5, False)
    same, *_ = ranks.run(2, run, siglip, saved, 3, 5, False)
    assert same["losses"] == whole["losses"][3:] and same["updates"] == [5, 3]
    (alone,) = ranks.run(1, run, siglip, saved, 3, 5, False)
    for ours, wanted in zip(alone["losses"], whole["losses"][3:], strict=True):
        assert ours == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_codes_are_those_of_training_everywhere(ranks: RankPool, tmp_path: Path, bf16: bool) -> None:
    import megatron_eve.hf  # noqa: F401
    from transformers import AutoModel

    from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
    from megatron_eve.models.vila_u.tower import load_tower
    from megatron_eve.models.vila_u.tower_folder import read_tower_folder

    siglip, saved = str(write_siglip(tmp_path / "siglip")), tmp_path / "saved"
    trained, _ = ranks.run(2, run, siglip, str(saved), 0, 3, bf16, True)
    codes = trained["codes"]
    assert codes.shape == (PICTURES, 4, 4, 3) and len(codes.unique()) > 20
    dtype = torch.bfloat16 if bf16 else torch.float32
    tower = load_tower(read_tower_folder(saved), torch.device("cpu"), dtype)
    parts = many_pictures().split(250)
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
