"""Contrast of pictures and texts: SigLIP's sigmoid loss (arXiv 2303.15343) over the global batch. Plain torch.

Shapes: n = pairs of this rank, N = of all ranks, C = width of their features, which have unit length.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_eve.models.towers.global_batch import gather_rows


def sigmoid_contrastive(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """This rank's share of the sigmoid loss: that of its own texts against the pictures of all ranks.

    The loss is mean over N texts of the sum over N pictures of -log sigmoid(+-(scale <text, picture> + bias)), with +
    for a text's own picture. The sum over the ranks of what they return is the loss, and the sum over the ranks of the
    gradients is its gradient. Where gradients are averaged over R ranks, as megatron-core does, multiply it by R.

    Args:
        images: [n, C], row i of the same pair as row i of `texts`; n may differ from rank to rank.
        texts: [n, C].
        scale: positive, exp(logit_scale).
        bias: logit_bias.
        group: ranks that the batch is divided among; None: this process alone. Every rank of it calls this, and runs
            the backward pass if images have a gradient.
    """
    every, start = gather_rows(images, group)
    logits = scale * texts @ every.t() + bias  # [n, N]
    signs = -torch.ones_like(logits)
    own = torch.arange(len(texts), device=texts.device)
    signs[own, start + own] = 1
    return -functional.logsigmoid(signs * logits).sum() / len(every)


def retrieval_accuracy(images: torch.Tensor, texts: torch.Tensor) -> tuple[float, float]:
    """How often the nearest of all texts is the picture's own, and the nearest picture the text's own: 0 .. 1.

    Args:
        images, texts: [N, C], row i of one of the same pair as row i of the other.
    """
    logits = images @ texts.t()
    own = torch.arange(len(images), device=images.device)
    return (logits.argmax(1) == own).float().mean().item(), (logits.argmax(0) == own).float().mean().item()
