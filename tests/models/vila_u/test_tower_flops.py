"""FLOPs of a pair in the tower's training: by hand at toy size, and against what torch counts in a forward pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import PRESETS
from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
from megatron_eve.models.vila_u.tower_flops import (
    decoder_forward,
    discriminator_forward,
    encoder_layer,
    parts_of_pair,
    perceptual_forward,
    pooling_forward,
    text_forward,
)
from tests.models.vila_u.pairs import SIDE, SIGLIP


@pytest.fixture
def vision(tmp_path: Path) -> TowerConfig:
    (tmp_path / "config.json").write_text(json.dumps(SIGLIP))
    return replace(PRESETS["vila_u_tower_tiny"].vision, vision_tower=str(tmp_path), gan_start=3)


def test_a_pair_by_hand(vision: TowerConfig) -> None:
    """16 positions of width 32 and inner width 64, 4 layers; 4 codes of each position among 512 vectors."""
    layer = 4 * 16 * 2 * 32 * 32 + 2 * 16 * 2 * 32 * 64 + 2 * 2 * 16 * 16 * 32
    patches = 16 * 2 * (3 * 16 * 16) * 32
    pooling = 2 * 16 * 2 * 32 * 32 + 2 * 2 * 32 * 32 + 2 * 2 * 16 * 32 + 2 * 2 * 32 * 64
    text = 2 * (4 * 8 * 2 * 32 * 32 + 2 * 8 * 2 * 32 * 64 + 2 * 2 * 8 * 8 * 32) + 2 * 32 * 32
    parts = parts_of_pair(vision, 0)
    assert parts["encoder"] == 2 * patches + 3 * 3 * layer
    assert parts["quantiser"] == 4 * 16 * 2 * 32 * 512
    assert parts["contrast"] == 3 * (layer + pooling) + text
    assert "discriminator" not in parts
    # Two passes forward and the gradient at one of them: 3. With it the last convolution of the decoder twice.
    assert parts["perceptual loss"] == 3 * perceptual_forward(SIDE)
    later = parts_of_pair(vision, 3)
    assert later.pop("discriminator") == 8 * discriminator_forward(SIDE) + 2 * (64 * 64 * 2 * 9 * 32 * 3)
    assert later == parts
    alone = parts_of_pair(replace(vision, reconstruction_weight=0.0), 3)
    assert set(alone) == {"encoder", "quantiser", "pixel decoder", "contrast"}
    assert 3 * alone["pixel decoder"] == parts["pixel decoder"]


def test_forward_passes_are_what_torch_counts(vision: TowerConfig) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_eve.models.towers.discriminator import PatchDiscriminator
    from megatron_eve.models.towers.perceptual import PerceptualLoss
    from megatron_eve.models.vila_u.tower import UnifiedTower
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower

    settings = tower_settings(vision)
    tower = VILAUTrainableTower(settings, SIGLIP["text_config"])

    def counted(work: object) -> int:
        # The counter does not know the fused attention of CPUs.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()  # type: ignore[operator]
        return int(counter.get_total_flops())

    features = torch.zeros(1, *settings.latent_shape)
    assert isinstance(tower, UnifiedTower)
    into = 16 * 2 * 32 * 32
    assert counted(lambda: tower.decode_features(features)) == into + decoder_forward(settings.decoder)
    picture = torch.zeros(1, 3, SIDE, SIDE)
    assert counted(lambda: PatchDiscriminator().eval()(picture)) == discriminator_forward(SIDE)
    perceptual = counted(lambda: PerceptualLoss()(picture, picture))
    # Beside the network of both pictures its five maps, which are not counted.
    assert perceptual == pytest.approx(2 * perceptual_forward(SIDE), rel=2e-3)
    tokens = torch.ones(1, 8, dtype=torch.int64)
    assert counted(lambda: tower.text_features(tokens)) == text_forward(vision)
    pooled = encoder_layer(settings.encoder) + pooling_forward(settings.encoder)
    assert counted(lambda: tower.image_features(features)) == pooled
