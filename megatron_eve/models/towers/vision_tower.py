"""A vision tower as a part of the model: CLIP's or SigLIP's, by transformers' own modules, frozen or trained.

It is replicated over the tensor- and context-parallel ranks, which share out the pictures of a pack (`sharing.py`).

Names of parameters are the published ones without their leading `vision_model.`
(`encoder.layers.0.self_attn.q_proj.weight`). transformers 4.57 and 5 nest these modules differently, so its own names
never reach a checkpoint.

Shapes: i = pictures, S = side of a picture in pixels, P = patches of it, N = P and CLIP's class token, K = width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Mean and standard deviation of each colour, by which the published processors normalise pixels.
NORMALISATION = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


@dataclass(frozen=True)
class TowerArchitecture:
    """A vision tower without its weights.

    Attributes:
        model_type: "clip" or "siglip".
        image_size, patch_size: sides in pixels.
        hidden_size: K.
        num_layers: encoder layers, those that are never run included.
        num_attention_heads: of each.
        ffn_hidden_size: inner width of its MLP.
        hidden_act: of the MLP, as transformers calls it.
        norm_epsilon: of its norms.
    """

    model_type: str
    image_size: int
    patch_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    hidden_act: str
    norm_epsilon: float


class VisionTower(torch.nn.Module):
    """A vision tower up to one of its hidden states, with random weights.

    Layers behind that, the last norm and SigLIP's pooling head are kept, since an export needs them; they are frozen
    and never run.

    Args:
        architecture: of the tower.
        select_layer: the hidden state that is returned, of `num_layers` + 1: 0 is the embeddings', -2 the output of the
            last layer but one. No norm follows it.
        recompute: compute the activations of each layer again in the backward pass.
    """

    def __init__(
        self, architecture: TowerArchitecture, select_layer: int, *, recompute: bool = False
    ) -> None:
        super().__init__()
        for name, module in _published_modules(architecture):
            self.add_module(name, module)
        self.width = architecture.hidden_size
        self.patches = (architecture.image_size // architecture.patch_size) ** 2
        self.recompute = recompute
        layers: Any = self.encoder.layers
        run = select_layer % (architecture.num_layers + 1)
        self.run_layers = layers[:run]
        kept = [layers[run:], *(getattr(self, name, None) for name in ("post_layernorm", "head"))]
        for module in kept:
            if module is not None:
                module.requires_grad_(False)
        for parameter in self.parameters():
            # megatron-core then averages its gradient over tensor-parallel ranks, each of which saw other pictures.
            parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
        # Not buffers, which would become bfloat16 with the weights.
        self._normalisation = tuple(torch.tensor(values) for values in NORMALISATION[architecture.model_type])

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return next(self.parameters()).dtype

    @property
    def trains(self) -> bool:
        """Does any of its parameters train?"""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of pictures.

        Args:
            images: uint8 [i, S, S, 3].

        Returns:
            [i, P, K], patches row by row; CLIP's class token is left out.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains):
            hidden = self.embeddings(self._normalised(images).permute(0, 3, 1, 2).to(self.dtype))
            if hasattr(self, "pre_layrnorm"):  # CLIP's, spelt so in its checkpoints
                hidden = self.pre_layrnorm(hidden)
            for layer in self.run_layers:
                if self.recompute and torch.is_grad_enabled():
                    hidden = checkpoint(_layer, layer, hidden, use_reentrant=False, preserve_rng_state=False)
                else:
                    hidden = _layer(layer, hidden)
        return hidden[:, hidden.shape[1] - self.patches :]

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 to float32, by mean and deviation of each colour."""
        if self._normalisation[0].device != images.device:
            self._normalisation = tuple(values.to(images.device) for values in self._normalisation)
        mean, deviation = self._normalisation
        return (images.float() * (1 / 255) - mean) / deviation


def _layer(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    """One encoder layer on [i, N, K], from its parts: arguments and results of a whole one differ by version."""
    attended = layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=None)[0]
    hidden = hidden + attended
    normed: torch.Tensor = layer.layer_norm2(hidden)
    return hidden + layer.mlp(normed)


def _published_modules(architecture: TowerArchitecture) -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts of transformers' module, by their published names, with its initial weights."""
    import transformers

    kind = "CLIP" if architecture.model_type == "clip" else "Siglip"
    config = getattr(transformers, f"{kind}VisionConfig")(
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        image_size=architecture.image_size,
        patch_size=architecture.patch_size,
        hidden_act=architecture.hidden_act,
        layer_norm_eps=architecture.norm_epsilon,
    )
    model = getattr(transformers, f"{kind}VisionModel")(config)
    # transformers 4 has the tower inside the model, transformers 5 is the tower itself.
    yield from getattr(model, "vision_model", model).named_children()
