"""The discriminator of towers that make pictures: PatchGAN (arXiv 1611.07004) as in RQ-VAE. Plain torch.

Shapes: n = pictures, S = their side in pixels, P = positions that are judged, S / 4 - 2 for two layers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn import functional

from megatron_eve.models.towers.global_batch import sum_over_ranks

Norm = Literal["batch", "group"]

_GROUPS = 32
_SPREAD = 0.02  # standard deviation of the initial weights


class PatchDiscriminator(nn.Module):
    """Says of each patch of a picture whether it is real (above 0) or reconstructed."""

    def __init__(
        self,
        width: int = 64,
        layers: int = 2,
        norm: Norm = "batch",
        group: ProcessGroup | None = None,
        seed: int = 0,
    ) -> None:
        """Build it, the same on all ranks, in float32 on the CPU. The names of its tensors are the public code's.

        Args:
            width: channels of the first layer.
            layers: that halve the picture.
            norm: "batch" normalises over the pictures of all ranks in training, and moves running statistics in each
                pass; "group" each picture alone, without communication.
            group: ranks that the batch is divided among; None: this process alone.
            seed: of the initial weights.
        """
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, layers + 1):
            wider = width * min(2**layer, 8)
            parts.append(
                nn.Conv2d(channels, wider, 4, stride=2 if layer < layers else 1, padding=1, bias=False)
            )
            parts.append(
                GlobalBatchNorm(wider, group)
                if norm == "batch"
                else nn.GroupNorm(math.gcd(_GROUPS, wider), wider)
            )
            parts.append(nn.LeakyReLU(0.2))
            channels = wider
        parts.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        self._reset(torch.Generator().manual_seed(seed))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """[n, 3, S, S], -1 .. 1 -> [n, 1, P, P]."""
        return self.main(pictures)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _reset(self, generator: torch.Generator) -> None:
        for part in self.main:
            if isinstance(part, nn.Conv2d):
                part.weight.normal_(0, _SPREAD, generator=generator)
                if part.bias is not None:
                    bound = part.weight[0].numel() ** -0.5
                    part.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(part, GlobalBatchNorm | nn.GroupNorm):
                part.weight.normal_(1, _SPREAD, generator=generator)


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of the pictures of all ranks, however they are divided.

    torch's SyncBatchNorm is the same for GPUs alone.
    """

    def __init__(self, channels: int, group: ProcessGroup | None) -> None:
        """Build it.

        Args:
            channels: C.
            group: ranks that the batch is divided among; None: this process alone.
        """
        super().__init__(channels)
        self.group = group

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, C, height, width] -> the same; in training every rank of the group calls it."""
        if not self.training or self.group is None or self.group.size() == 1:
            return super().forward(values)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        exact = values.to(torch.promote_types(values.dtype, torch.float32))
        here = exact.new_full((1,), exact.numel() // exact.shape[1])
        sums = sum_over_ranks(torch.cat([exact.sum((0, 2, 3)), here]), self.group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # Not E[x^2] - E[x]^2, which loses digits.
        centred = exact - mean[:, None, None]
        variance = sum_over_ranks(centred.square().sum((0, 2, 3)), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(values.dtype)


def hinge_loss(real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Of the discriminator: half of mean(relu(1 - real)) + mean(relu(1 + made)).

    Args:
        real, made: what it says of pictures and of their reconstructions.
    """
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())


def generator_loss(made: torch.Tensor) -> torch.Tensor:
    """Of the tower: -mean of what the discriminator says of its reconstructions."""
    return -made.mean()


def adaptive_weight(reconstruction: torch.Tensor, generator: torch.Tensor) -> torch.Tensor:
    """Lambda: how many times the gradient of the generator's loss is as long as that of the reconstruction.

    Args:
        reconstruction: gradient of MSE + perceptual loss at the weight of the pixel decoder's last convolution, over
            the global batch: averaged over the ranks before it comes here.
        generator: likewise, of `generator_loss`.

    Returns:
        A number without gradient, 0 .. 10,000.
    """
    return (reconstruction.norm() / (generator.norm() + 1e-4)).clamp(0, 1e4).detach()
