"""How a tower that makes codes and pictures is trained: weights of its losses. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_eve.config.flag_types import Flag

PERCEPTUAL_LEVELS = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))
"""Of the VGG-16 of the perceptual loss: convolutions of each level, at whose end it looks, and by how many times its
channels are those of the first."""


@dataclass(frozen=True)
class TowerTraining:
    """Weights of the losses of a tower, and what they are computed from; the defaults are RQ-VAE's."""

    contrastive_weight: float = 1.0
    """Weight of the contrastive loss between pictures and texts; 0 leaves the text side out."""
    reconstruction_weight: float = 1.0
    """Weight of the reconstruction losses together: squared error, perceptual, commitment and adversarial."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss among these; 0 leaves it out."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss among these."""
    adversarial_weight: float = 0.75
    """Weight of the adversarial loss among these, beside the adaptive one; 0 trains no discriminator."""
    gan_start: Annotated[int, Flag("N")] = 0
    """Iterations before the adversarial loss and the discriminator begin."""
    contrastive_path: Literal["quantized", "unquantized"] = "quantized"
    """Features of pictures that are compared with texts: behind the quantiser, or in front of it."""
    discriminator_norm: Literal["batch", "group"] = "batch"
    """Normalisation in the discriminator: batch is over the pictures of the whole step, group over each by itself."""
    perceptual_weights: Annotated[
        str | None, Flag("FILE", "none; needed unless --perceptual-weight is 0")
    ] = None
    """File with the weights of torchvision's VGG-16 for the perceptual loss; the word random takes random features,
    which are of use at toy size alone."""
    perceptual_linear: Annotated[str | None, Flag("FILE", "in --perceptual-weights")] = None
    """File with the five maps of the perceptual loss, vgg.pth of the package lpips."""
