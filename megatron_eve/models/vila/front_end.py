"""VILA's front end as a Megatron pre-process module: pictures through the vision tower and the projector.

The pictures of a pack are shared out over its tensor- and context-parallel ranks, each of which has the whole tower.
All of them gather the features of all pictures, and the projector is tensor parallel.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.towers.sharing import shared_features
from megatron_eve.models.towers.tower_module import TowerSettings, VisionTower
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.projectors import build_projector


class TowerFrontEnd(MegatronModule):
    """Vision tower and projector (`vision_tower` and `mm_projector` of the published models)."""

    def __init__(self, config: TransformerConfig, vision: VILAConfig) -> None:
        """Build both; `config` is the decoder's."""
        super().__init__(config=config)
        self.tower = VisionTower(config, tower_settings(vision))
        self.projector = build_projector(config, vision)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the images of a pack.

        Args:
            inputs: with the view "tower", uint8 [i, S, S, 3]: this rank's share of the pictures, or of their tiles.

        Returns:
            [V, D] on every rank that shares the pack, image after image.
        """
        count, settings = len(inputs.grids), self.tower.settings
        features = shared_features(self.tower, inputs.pixels["tower"], count)
        features = features[: count * settings.patches]
        rows: torch.Tensor = self.projector(features.view(count, settings.patches, settings.hidden_size))
        return rows.flatten(0, 1)


def tower_settings(vision: VILAConfig) -> TowerSettings:
    """The vision tower of a configuration."""
    return TowerSettings(
        model_type=vision.vision_model_type,
        side=vision.image_size,
        patch_size=vision.vision_patch_size,
        hidden_size=vision.vision_hidden_size,
        num_layers=vision.vision_num_layers,
        num_attention_heads=vision.vision_num_attention_heads,
        ffn_hidden_size=vision.vision_ffn_hidden_size,
        hidden_act=vision.vision_hidden_act,
        norm_epsilon=vision.vision_norm_epsilon,
        layers_run=vision.tower_layers,
        recompute=vision.recompute_vision,
    )
