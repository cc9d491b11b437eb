"""One step of a tower's training: the tower's losses, the discriminator's, and the update of both.

The order is RQ-VAE's (arXiv 2203.01941): reconstructions are made once; the tower learns from what the discriminator
says of them before its own update, and the discriminator from the same reconstructions. Both are updated at the end.

Each rank has a slice of the global batch, and slices may differ in length. No number depends on how it is divided: a
rank's losses are its share of those of the global batch, so that their sums over the ranks are the losses, and the sums
of the ranks' gradients the gradients.

Shapes: n = pairs of this rank, S = side of a picture, P = side of one that is made, T = tokens of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch.distributed import ProcessGroup

from megatron_eve.models.towers.contrast import sigmoid_contrastive
from megatron_eve.models.towers.discriminator import adaptive_weight, generator_loss, hinge_loss
from megatron_eve.models.towers.global_batch import sum_over_ranks
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.models.towers.trainable import TowerOutput
from megatron_eve.training.faults.bad_steps import bad_step_reason, validate_step
from megatron_eve.training.loop.step_result import StepResult, Values
from megatron_eve.training.tower.networks import TowerNetworks

DISCRIMINATOR_NORM = "discriminator grad norm"


@dataclass(frozen=True)
class TowerBatch:
    """The pairs of this rank.

    Attributes:
        pixels: uint8 [n, S, S, 3] on this rank's device, n > 0.
        tokens: int64 [n, T], there.
        total: pairs of the global batch.
        iteration: iterations before this one: chooses what unused codes restart from, and whether the adversarial loss
            has begun.
        seed: of the run.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    total: int
    iteration: int
    seed: int

    @property
    def share(self) -> float:
        """Of this rank in a mean over the pictures of the global batch."""
        return len(self.pixels) / self.total


@dataclass
class TowerLosses:
    """What a pass has computed.

    Attributes:
        shares: this rank's share of each loss by its name, without gradient and without its weight.
        figures: what else is logged, the same on all ranks.
    """

    shares: dict[str, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, torch.Tensor] = field(default_factory=dict)

    def summed(self, group: ProcessGroup) -> tuple[Values, Values]:
        """The losses, sums over the ranks in float64, and the figures. Collective."""
        totals = torch.stack([share.double() for share in self.shares.values()])
        torch.distributed.all_reduce(totals, group=group)
        figures = {name: figure.item() for name, figure in self.figures.items()}
        return dict(zip(self.shares, totals.tolist(), strict=True)), figures


def adversarial(networks: TowerNetworks, settings: TowerTraining, iteration: int) -> bool:
    """Is there an adversarial loss in the step behind so many iterations?"""
    return networks.discriminator is not None and iteration >= settings.gan_start


def forward_backward(networks: TowerNetworks, settings: TowerTraining, batch: TowerBatch) -> TowerLosses:
    """Losses and gradients of both networks, and the update of the codebooks; gradients are left reduced in the DDP
    buffers. Collective."""
    group, losses = parallel_state.get_data_parallel_group(), TowerLosses()
    tower, gan = networks.tower, adversarial(networks, settings, batch.iteration)
    compares = settings.contrastive_weight > 0 and tower.has_texts
    output = tower.train_forward(
        batch.pixels,
        seed=batch.seed,
        iteration=batch.iteration,
        group=group,
        contrast=settings.contrastive_path if compares else None,
    )
    targets = tower.targets(batch.pixels)
    # megatron-core averages gradients over the ranks.
    ranks = group.size()
    roots: list[torch.Tensor] = []
    gradients: list[torch.Tensor | None] = []
    if (found := _of_pictures(networks, settings, batch, output, targets, losses)) is not None:
        roots.append(output.pictures)
        gradients.append((ranks * settings.reconstruction_weight * found).to(output.pictures.dtype))
    rest = _commitment(settings, batch, output, losses)
    if compares:
        assert output.images is not None
        contrastive = sigmoid_contrastive(
            output.images, tower.text_features(batch.tokens), *tower.logit_scale_and_bias(), group
        )
        losses.shares["contrastive loss"] = contrastive.detach()
        rest = rest + settings.contrastive_weight * contrastive
    torch.autograd.backward([*roots, ranks * rest], [*gradients, None])
    networks.chunks[0].finish_grad_sync()
    if gan:
        _discriminator(networks, settings, batch, output.pictures.detach(), targets, losses)
        networks.chunks[1].finish_grad_sync()
    losses.figures |= _usage(tower.usage())
    return losses


def _of_pictures(
    networks: TowerNetworks,
    settings: TowerTraining,
    batch: TowerBatch,
    output: TowerOutput,
    targets: torch.Tensor,
    losses: TowerLosses,
) -> torch.Tensor | None:
    """Gradient [n, 3, P, P] at the pictures of squared error, perceptual and adversarial loss; None if none of them
    has a weight. Taken here, since lambda needs two parts of it before the way back through the tower begins."""
    # Losses are computed in the targets' float32.
    made = output.pictures.detach().to(targets.dtype).requires_grad_()
    error = (made - targets).square().mean() * batch.share
    losses.shares["reconstruction loss"] = error.detach()
    if not settings.reconstruction_weight:
        return None
    fidelity = error
    if networks.perceptual is not None and settings.perceptual_weight:
        perceptual = networks.perceptual(made, targets).sum() / batch.total
        losses.shares["perceptual loss"] = perceptual.detach()
        fidelity = fidelity + settings.perceptual_weight * perceptual
    (gradient,) = torch.autograd.grad(fidelity, made)
    if not adversarial(networks, settings, batch.iteration):
        return gradient
    assert networks.discriminator is not None
    generator = generator_loss(networks.discriminator(made)) * batch.share
    losses.shares["generator loss"] = generator.detach()
    (fooling,) = torch.autograd.grad(generator, made)
    weight = _lambda(networks, output.pictures, gradient, fooling)
    losses.figures["adaptive weight"] = weight
    return gradient + settings.adversarial_weight * weight * fooling


def _lambda(
    networks: TowerNetworks, pictures: torch.Tensor, fidelity: torch.Tensor, fooling: torch.Tensor
) -> torch.Tensor:
    """The adaptive weight, from gradients at the last convolution over the global batch.

    Args:
        networks: of the step.
        pictures: that the tower made.
        fidelity, fooling: gradients at this rank's pictures, of what lambda compares.
    """
    last = networks.tower.last_weight()
    found = [
        torch.autograd.grad(pictures, last, one.to(pictures.dtype), retain_graph=True)[0]
        for one in (fidelity, fooling)
    ]
    # Each rank has its share of both.
    both = sum_over_ranks(torch.stack(found).to(fidelity.dtype), parallel_state.get_data_parallel_group())
    return adaptive_weight(both[0], both[1])


def _commitment(
    settings: TowerTraining, batch: TowerBatch, output: TowerOutput, losses: TowerLosses
) -> torch.Tensor:
    """This rank's share of the commitment loss, with its weights."""
    commitment = output.commitment * batch.share
    losses.shares["commitment loss"] = commitment.detach()
    return settings.reconstruction_weight * settings.commitment_weight * commitment


def _discriminator(
    networks: TowerNetworks,
    settings: TowerTraining,
    batch: TowerBatch,
    made: torch.Tensor,
    targets: torch.Tensor,
    losses: TowerLosses,
) -> None:
    """Gradients of the discriminator: reconstructions first, then pictures, which is the order of its statistics."""
    assert networks.discriminator is not None
    of_made = networks.discriminator(made.to(targets.dtype))
    of_real = networks.discriminator(targets)
    loss = hinge_loss(of_real, of_made) * batch.share
    losses.shares["discriminator loss"] = loss.detach()
    (parallel_state.get_data_parallel_world_size() * settings.adversarial_weight * loss).backward()


def _usage(usage: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each depth from 1: codes in use in the step, and their perplexity, exp of the entropy of their frequencies."""
    shares = usage.double() / usage.sum(1, keepdim=True)
    perplexity = torch.exp(-torch.special.xlogy(shares, shares).sum(1))
    found = {f"codes in use {depth}": used for depth, used in enumerate((usage > 0).sum(1).double(), 1)}
    return found | {f"perplexity {depth}": one for depth, one in enumerate(perplexity, 1)}


def train_step(
    networks: TowerNetworks,
    optimizer: Any,
    settings: TowerTraining,
    batch: TowerBatch,
    *,
    recent: Sequence[Values] = (),
    spike_factor: float | None = None,
) -> StepResult:
    """Forward, backward, and the update of both networks if the step is good; else codebooks, too, stay as they were.
    Collective.

    Args:
        networks: see `wrap_networks`.
        optimizer: of `build_optimizer(..., per_network=True)`.
        settings: weights of the losses.
        batch: of this rank.
        recent, spike_factor: what makes a step bad (see `bad_step_reason`).
    """
    group = parallel_state.get_data_parallel_group()
    machine, restore, again = get_rerun_state_machine(), networks.snapshot(), False
    active = optimizer.chained_optimizers[: 1 + adversarial(networks, settings, batch.iteration)]
    # Once, or as often as the rerun state machine repeats the step; the last result counts.
    while machine.should_run_forward_backward(None):
        if again:
            restore()
        again = True
        for chunk in networks.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        found = forward_backward(networks, settings, batch)
        for one in active:
            one.prepare_grads()
        norms = [float(one.get_grad_norm()) for one in active]
        losses, figures = found.summed(group)
        if len(norms) > 1:
            losses[DISCRIMINATOR_NORM] = norms[1]
        result = StepResult(losses, norms[0], figures=figures)
        result = replace(result, bad=bad_step_reason(result.values, recent, spike_factor))
        validate_step(machine, result.values, result.bad)
    _, leaves, exit_code = machine.should_checkpoint_and_exit()
    if result.bad is None and not leaves:
        for one in active:
            # The gradients are ready; clipping, of each network by itself, needs their norm again.
            if one.config.clip_grad > 0:
                one.step()
            else:
                one.step_with_ready_grads()
    else:
        restore()
    return replace(result, exit_code=exit_code)
