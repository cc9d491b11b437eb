"""The second opinion: one step of a tower's training by one process, written for reading. No DDP, no megatron-core.

Encoder and texts are transformers', the optimizers torch's, BatchNorm torch's; quantiser, losses and the order of the
step are written out here. Of the package it takes the modules that golden tests hold (pixel decoder, perceptual loss)
and the draws of restarts, which are an input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from megatron_eve.models.towers.perceptual import random_perceptual
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.vila_u.pixel_decoder import PixelDecoder
from megatron_eve.models.vila_u.restart import KeyedDraw
from megatron_eve.models.vila_u.tower_settings import TowerSettings

Tensors = dict[str, torch.Tensor]


def plain_discriminator() -> nn.Sequential:
    """The same layers as `PatchDiscriminator` of two layers and a width of 64, of torch."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, 4, 1, 1, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 1, 4, 1, 1),
    )


class Codebook(NamedTuple):
    """Vectors [K, C], and the running sums that they are made of: [K] and [K, C]."""

    weight: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor


class PlainTower(nn.Module):
    """Everything that a step changes, in float64."""

    def __init__(
        self, settings: TowerSettings, siglip: dict[str, Any], tower: Tensors, discriminator: Tensors
    ) -> None:
        """Take the weights of our tower and discriminator, by their names there."""
        super().__init__()
        import transformers

        vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**siglip["vision_config"]))
        text = transformers.SiglipTextModel(transformers.SiglipTextConfig(**siglip["text_config"]))
        self.encoder = getattr(vision, "vision_model", vision)
        self.text = getattr(text, "text_model", text)
        self.post_quant_conv = nn.Conv2d(settings.latent_shape[2], settings.decoder.z_channels, 1)
        self.decoder = PixelDecoder(settings.decoder)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        books = {name: tensor for name, tensor in tower.items() if name.startswith("quantizer.")}
        self.load_state_dict({name: tensor for name, tensor in tower.items() if name not in books})
        self.text.requires_grad_(False)
        self.discriminator = plain_discriminator()
        self.discriminator.load_state_dict(
            {name.removeprefix("discriminator.main."): tensor for name, tensor in discriminator.items()}
        )
        self.double()
        self.settings, self.depth = settings, settings.depth
        named = [f"quantizer.codebooks.{0 if settings.shared_codebook else d}." for d in range(self.depth)]
        every = {
            name: Codebook(
                books[f"{name}weight"][:-1].double(),
                books[f"{name}cluster_size_ema"].double(),
                books[f"{name}embed_ema"].double(),
            )
            for name in named
        }
        self.names, self.codebooks = named, every

    def quantize(
        self, features: torch.Tensor, draw: KeyedDraw
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features [V, C] -> codes [V, D], z_q [V, C], commitment; the codebooks move depth by depth."""
        left, total = features.detach(), torch.zeros_like(features)
        codes, losses = [], []
        for level in range(self.depth):
            book = self.codebooks[self.names[level]]
            code = torch.cdist(left, book.weight).argmin(1)
            total = total + book.weight[code]
            codes.append(code)
            losses.append((features - total).square().mean())
            self.codebooks[self.names[level]] = self.moved(book, left, code, draw, level)
            left = left - book.weight[code]
        return torch.stack(codes, 1), features + (total - features).detach(), torch.stack(losses).mean()

    def moved(
        self, book: Codebook, vectors: torch.Tensor, codes: torch.Tensor, draw: KeyedDraw, level: int
    ) -> Codebook:
        """The codebook behind one depth of one step."""
        size, width = book.weight.shape
        chosen = functional.one_hot(codes, size).double()
        counts = 0.99 * book.counts + 0.01 * chosen.sum(0)
        sums = 0.99 * book.sums + 0.01 * chosen.T @ vectors
        pool = vectors
        if len(pool) < size:
            pool = pool.repeat(-(-size // len(pool)), 1)
            pool = pool + draw.noise(level, tuple(pool.shape)).double() * 0.01 / width**0.5
        pool = pool[draw.draw(level, len(pool))[:size]]
        unused = counts < 1
        sums = torch.where(unused[:, None], pool, sums)
        counts = torch.where(unused, 1.0, counts)
        n = counts.sum()
        smoothed = n * (counts + 1e-5) / (n + size * 1e-5)
        return Codebook(sums / smoothed[:, None], counts, sums)


class PlainStep:
    """Three steps or more of one process."""

    def __init__(self, tower: PlainTower, training: TowerTraining, lr: float, seed: int) -> None:
        self.tower, self.training, self.seed, self.iteration = tower, training, seed, 0
        self.perceptual = random_perceptual(0, 4).double()
        made = [p for n, p in tower.named_parameters() if p.requires_grad and "discriminator." not in n]
        adam: dict[str, Any] = {"lr": lr, "betas": (0.5, 0.9), "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(made, **adam)
        self.discriminator = torch.optim.AdamW(tower.discriminator.parameters(), **adam)

    def __call__(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[dict[str, float], Tensors]:
        """Losses and gradients of a step on the whole batch."""
        tower, training, losses = self.tower, self.training, {}
        encoder = tower.encoder
        normal = ((pixels.float() / 255 - 0.5) / 0.5).double().permute(0, 3, 1, 2)
        hidden = encoder.embeddings(normal)
        for layer in encoder.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        features = hidden.flatten(0, 1)
        draw = KeyedDraw(self.seed, self.iteration)
        codes, quantized, commitment = tower.quantize(features, draw)
        side = tower.settings.latent_shape[0]
        grid = quantized.view(len(pixels), side, side, -1).permute(0, 3, 1, 2)
        if tower.settings.decoder_latent_shape:
            grid = functional.interpolate(grid, tower.settings.decoder_latent_shape, mode="bilinear")
        made = tower.decoder(tower.post_quant_conv(grid))
        target = (pixels.double() / 127.5 - 1).permute(0, 3, 1, 2)

        error = (made - target).square().mean()
        perceptual = self.perceptual(made, target).mean()
        losses |= {"reconstruction loss": error, "perceptual loss": perceptual, "commitment loss": commitment}
        total = error + training.perceptual_weight * perceptual + training.commitment_weight * commitment
        gan = self.iteration >= training.gan_start
        if gan:
            generator = -tower.discriminator(made).mean()
            last = tower.decoder.conv_out.weight
            fidelity = error + training.perceptual_weight * perceptual
            (one,) = torch.autograd.grad(fidelity, last, retain_graph=True)
            (other,) = torch.autograd.grad(generator, last, retain_graph=True)
            weight = (one.norm() / (other.norm() + 1e-4)).clamp(0, 1e4)
            losses |= {"generator loss": generator, "adaptive weight": weight}
            total = total + weight * training.adversarial_weight * generator

        compared = quantized.view_as(hidden) if training.contrastive_path == "quantized" else hidden
        pooled = encoder.head(encoder.post_layernorm(encoder.encoder.layers[-1](compared, None)))
        said = tower.text.embeddings(input_ids=tokens)
        for layer in tower.text.encoder.layers:
            said = layer(said, None)
        said = tower.text.head(tower.text.final_layer_norm(said)[:, -1])
        images, texts = (one / one.norm(dim=-1, keepdim=True) for one in (pooled, said))
        logits = tower.logit_scale.exp() * texts @ images.T + tower.logit_bias
        signs = 2 * torch.eye(len(pixels)).double() - 1
        contrastive = -functional.logsigmoid(signs * logits).sum(1).mean()
        losses["contrastive loss"] = contrastive
        total = training.contrastive_weight * contrastive + training.reconstruction_weight * total

        self.optimizer.zero_grad()
        total.backward()
        self.discriminator.zero_grad()
        if gan:
            of_made, of_real = tower.discriminator(made.detach()), tower.discriminator(target)
            hinge = (functional.relu(1 - of_real).mean() + functional.relu(1 + of_made).mean()) / 2
            losses["discriminator loss"] = hinge
            (training.adversarial_weight * hinge).backward()
        gradients = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
        self.optimizer.step()
        if gan:
            self.discriminator.step()
        self.iteration += 1
        for depth in range(tower.depth):
            _, times = codes[:, depth].unique(return_counts=True)
            often = times / times.sum(dtype=torch.float64)
            losses[f"codes in use {depth + 1}"] = torch.tensor(len(times))
            losses[f"perplexity {depth + 1}"] = torch.exp(-(often * often.log()).sum())
        return {name: loss.item() for name, loss in losses.items()}, gradients

    def buffers(self) -> Tensors:
        """Codebooks and statistics, by our names."""
        found = {f"discriminator.main.{name}": one for name, one in self.tower.discriminator.named_buffers()}
        for name, book in self.tower.codebooks.items():
            found |= {
                f"{name}weight": book.weight,
                f"{name}cluster_size_ema": book.counts,
                f"{name}embed_ema": book.sums,
            }
        return found
