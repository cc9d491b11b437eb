"""VILA's front end as a Megatron pre-process module: pictures through the vision tower, features through the projector.

Shapes: I = pictures of a pack, i = this rank's share of them, S = side of a picture in pixels, V = rows of all, D =
decoder width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.model_parts import VisualInputs
from megatron_eve.models.towers.sharing import shared_features
from megatron_eve.models.towers.vision_tower import TowerArchitecture, VisionTower
from megatron_eve.models.vila.config import VILAConfig
from megatron_eve.models.vila.projectors import Projector


class TowerFrontEnd(MegatronModule):
    """Vision tower and projector (`vision_tower` and `mm_projector` of the published model).

    Args:
        config: the decoder's.
        vision: VILA's settings.
    """

    def __init__(self, config: TransformerConfig, vision: VILAConfig) -> None:
        super().__init__(config=config)
        self.tower = VisionTower(
            tower_architecture(vision), vision.vision_select_layer, recompute=vision.recompute_vision
        )
        self.tower.to(dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            self.tower.cuda()
        self.projector = Projector(config, vision)

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """Embed the pictures of a pack.

        Args:
            inputs: with the view "tower", uint8 [i, S, S, 3], this rank's share.

        Returns:
            [V, D], picture after picture, on every rank that shares the pack.
        """
        rows: torch.Tensor = self.projector(
            shared_features(self.tower, inputs.pixels["tower"], len(inputs.grids))
        )
        return rows


def tower_architecture(vision: VILAConfig) -> TowerArchitecture:
    """The vision tower that the settings describe."""
    return TowerArchitecture(
        model_type=vision.vision_model_type,
        image_size=vision.image_size,
        patch_size=vision.vision_patch_size,
        hidden_size=vision.vision_hidden_size,
        num_layers=vision.vision_num_layers,
        num_attention_heads=vision.vision_num_attention_heads,
        ffn_hidden_size=vision.vision_ffn_hidden_size,
        hidden_act=vision.vision_hidden_act,
        norm_epsilon=vision.vision_norm_epsilon,
    )
