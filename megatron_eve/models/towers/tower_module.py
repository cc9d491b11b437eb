"""A vision tower as a part of the model: the layers of transformers' CLIP or SigLIP, under names of our own.

Names are those of published folders without their leading `vision_model.`, such as
`encoder.layers.0.self_attn.q_proj.weight`. transformers 4.57 and 5 put a tower's parts at different places, so its own
names never reach a checkpoint.

Replicated over the tensor-parallel ranks, which share the pictures out (`sharing.py`).

Shapes: i = pictures, S = side of a picture in pixels, G = S // patch size, K = width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import islice
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megatron_eve.models.replicated import replicated
from megatron_eve.models.towers.normalisation import NORMALISATION

# In the order in which they are run. `pre_layrnorm` (its published name) is CLIP's alone, `head` SigLIP's.
_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")


@dataclass(frozen=True)
class TowerSettings:
    """What a vision tower is built from.

    Attributes:
        model_type: clip or siglip.
        side: S.
        patch_size: side of a patch in pixels.
        hidden_size: K.
        num_layers: encoder layers, those that are never run included.
        num_attention_heads: of each layer.
        ffn_hidden_size: inner width of the MLP.
        hidden_act: its activation, as transformers calls it.
        norm_epsilon: of the norms.
        layers_run: encoder layers in front of the hidden state that is taken; the rest is kept and never run.
        recompute: compute the layers again in the backward pass instead of keeping their activations.
    """

    model_type: str
    side: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    hidden_act: str
    norm_epsilon: float
    layers_run: int
    recompute: bool = False

    @property
    def patches(self) -> int:
        """G * G."""
        return (self.side // self.patch_size) ** 2


class VisionTower(MegatronModule):
    """A vision tower with random weights, on this rank's device.

    What is never run (later layers, last norm, pooling head) is frozen here, for good; the rest trains until it is
    frozen. A tower without a parameter that trains runs without gradients.
    """

    def __init__(self, config: TransformerConfig, settings: TowerSettings) -> None:
        """Build the tower; `config` is the decoder's, for dtype and device."""
        super().__init__(config=config)
        self.settings = settings
        model = _transformers_tower(settings)
        for name in _PARTS:
            if hasattr(model, name):
                setattr(self, name, replicated(getattr(model, name), config))
        # transformers 4.57 demands a causal mask of CLIP's layers; 5 has none.
        causal = "causal_attention_mask" in signature(self.encoder.layers[0].forward).parameters
        self._masks = (None, None) if causal else (None,)
        for parameter in self.parameters():
            # Each tensor-parallel rank sees its own pictures (see `shared_features`).
            parameter.average_gradients_across_tp_domain = True
        for _, parameter in self.never_run():
            parameter.requires_grad_(False)

    def never_run(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters behind the hidden state that is taken, by name: checkpoints keep them, nothing trains them."""
        last = range(self.settings.layers_run, self.settings.num_layers)
        unused = ("post_layernorm.", "head.", *(f"encoder.layers.{i}." for i in last))
        for name, parameter in self.named_parameters():
            if name.startswith(unused):
                yield name, parameter

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        A tower that trains runs on a black picture where there is none, which adds nothing to any gradient: with
        overlapped reductions and gathers, megatron-core waits on each rank for the same modules and gradients.

        Args:
            pictures: uint8 [i, S, S, 3]; i may be 0.

        Returns:
            [i, G * G, K], patches row by row, without the class token. No norm is applied to them.
        """
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        count = len(pictures)
        if not count and not trains:
            shape = 0, self.settings.patches, self.settings.hidden_size
            return next(self.parameters()).new_empty(shape)
        if not count:
            pictures = pictures.new_zeros(1, self.settings.side, self.settings.side, 3)
        with torch.set_grad_enabled(trains):
            return self._features(pictures)[:count]

    def _features(self, pictures: torch.Tensor) -> torch.Tensor:
        for hidden in self.hidden_states(self._normalised(pictures)):
            last = hidden
        return last[:, last.shape[1] - self.settings.patches :]  # the class token stands in front

    def hidden_states(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Embedded patches of normalised pictures [i, 3, S, S], then what each layer that is run gives: [i, n, K]."""
        hidden = self.embeddings(pixels)
        if hasattr(self, "pre_layrnorm"):
            hidden = self.pre_layrnorm(hidden)
        yield hidden
        for layer in islice(self.encoder.layers, self.settings.layers_run):
            if self.settings.recompute and torch.is_grad_enabled():
                # There is no dropout, so no random number to restore.
                hidden = checkpoint(self._run, layer, hidden, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._run(layer, hidden)
            yield hidden

    def pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a SigLIP compares with texts: hidden states [i, n, K] behind the layers that are run go through the
        others, the last norm and the pooling head: [i, K]."""
        for layer in islice(self.encoder.layers, self.settings.layers_run, None):
            hidden = self._run(layer, hidden)
        return self.head(self.post_layernorm(hidden))  # type: ignore[no-any-return]

    def _run(self, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *self._masks)
        return output[0] if isinstance(output, tuple) else output

    def _normalised(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [i, S, S, 3] -> [i, 3, S, S] in the dtype of the weights, rounded once from float32."""
        mean, std = _constants(self.settings.model_type, pictures.device)
        pixels = pictures.float().div_(255).sub_(mean).div_(std)
        return pixels.permute(0, 3, 1, 2).to(next(self.parameters()).dtype)


@cache
def _constants(model_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [3] each. Kept: a list that goes to a GPU makes it wait."""
    mean, std = NORMALISATION[model_type]
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def _transformers_tower(settings: TowerSettings) -> Any:
    """transformers' tower, with random weights: the module that has the parts."""
    import transformers

    config_class, model_class = {
        "clip": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip": (transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
    }[settings.model_type]
    model = model_class(
        config_class(
            image_size=settings.side,
            patch_size=settings.patch_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_attention_heads,
            intermediate_size=settings.ffn_hidden_size,
            hidden_act=settings.hidden_act,
            layer_norm_eps=settings.norm_epsilon,
            attn_implementation="sdpa",
        )
    )
    return getattr(model, "vision_model", model)  # transformers 4.57 wraps it
