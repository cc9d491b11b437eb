"""The toy's front end: the mean colour of each patch, projected to the decoder's width."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.model_parts import VisualInputs


class ToyFrontEnd(MegatronModule):
    """Replicated over the tensor-parallel ranks, all of which see the whole pack, so its gradients agree."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.projection = torch.nn.Linear(3, config.hidden_size, dtype=config.params_dtype)
        if not config.use_cpu_initialization:
            self.projection.cuda()

    def forward(self, inputs: VisualInputs) -> torch.Tensor:
        """uint8 [V, 3 * patch * patch] -> [V, D], a row for each patch."""
        colours = inputs.pixels["patches"].float().unflatten(1, (3, -1)).mean(2) / 255  # (V, 3)
        return self.projection(colours.to(self.projection.weight.dtype))
