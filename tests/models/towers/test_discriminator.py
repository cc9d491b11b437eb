"""The discriminator and its losses: torch's BatchNorm, and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_eve.models.towers.discriminator import (
    GlobalBatchNorm,
    PatchDiscriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from tests.ranks import RankPool

PICTURES = 7


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    real, made = (torch.rand(PICTURES, 3, 24, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    return real * 2 - 1, made * 1.5 - 1


def step_of_rank(slices: list[int], alone: bool = False) -> dict[str, Any]:
    """Losses, gradients and running statistics of a generator's and a discriminator's pass.

    `alone`: BatchNorm over the pictures of this rank.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    group = dist.group.WORLD if dist.is_initialized() and not alone else None
    start, share = sum(slices[:rank]), slices[rank] / PICTURES
    real, made = (one[start : start + slices[rank]].clone() for one in pictures())
    made.requires_grad_()
    discriminator = PatchDiscriminator(8, 2, "batch", group, seed=3).double().train()
    generator = generator_loss(discriminator(made)) * share
    generator.backward()
    discriminator.zero_grad()
    judged = discriminator(made.detach()), discriminator(real)
    hinge = hinge_loss(judged[1], judged[0]) * share
    hinge.backward()
    return {
        "rows": made.grad,
        "sums": {"generator": generator.detach(), "hinge": hinge.detach()}
        | {name: parameter.grad for name, parameter in discriminator.named_parameters()},
        "same": dict(discriminator.named_buffers()),
    }


def together(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    for one in ranks[1:]:
        torch.testing.assert_close(one["same"], ranks[0]["same"], rtol=0, atol=0)
    return {
        "rows": torch.cat([one["rows"] for one in ranks]),
        "sums": {key: torch.stack([one["sums"][key] for one in ranks]).sum(0) for key in ranks[0]["sums"]},
        "same": ranks[0]["same"],
    }


@pytest.mark.parametrize("slices", [[7], [3, 4], [1, 4, 2]])
def test_ranks_with_unequal_slices_give_what_torch_gives_in_one_process(
    ranks: RankPool, slices: list[int]
) -> None:
    found = together(ranks.run(len(slices), step_of_rank, slices))
    torch.testing.assert_close(found, step_of_rank([PICTURES]), rtol=1e-9, atol=1e-11)
    assert found["same"]["main.3.num_batches_tracked"] == 3


def test_statistics_of_a_rank_alone_are_seen(ranks: RankPool) -> None:
    found, wanted = ranks.run(2, step_of_rank, [3, 4], True), step_of_rank([PICTURES])
    assert not torch.allclose(torch.cat([one["rows"] for one in found]), wanted["rows"], rtol=1e-3)


def normalised_in_float32() -> tuple[torch.Tensor, torch.Tensor]:
    """Far from 0, where mean of squares less square of the mean would lose all digits."""
    values = 1000 + torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    return GlobalBatchNorm(2, dist.group.WORLD)(values).detach(), values


def test_values_far_from_0_keep_their_digits(ranks: RankPool) -> None:
    for found, values in ranks.run(2, normalised_in_float32):
        twice = torch.cat([values, values]).double()
        wanted = torch.nn.BatchNorm2d(2).double()(twice)[:4]
        assert (found - wanted).abs().max() < 2e-3


def test_group_norm_looks_at_each_picture_alone() -> None:
    made = pictures()[1].float()
    discriminator = PatchDiscriminator(8, 2, "group").train()
    torch.testing.assert_close(discriminator(made)[:2], discriminator(made[:2]))
    assert discriminator(made).shape == (PICTURES, 1, 4, 4) and not list(discriminator.buffers())


def test_initial_weights_are_those_of_the_seed() -> None:
    one, same, other = (PatchDiscriminator(16, 3, seed=seed) for seed in (1, 1, 2))
    first, again, third = (next(iter(each.parameters())) for each in (one, same, other))
    assert torch.equal(first, again) and not torch.equal(first, third)
    assert 0.015 < one.main[2].weight.std() < 0.025 and abs(one.main[3].weight.mean() - 1) < 0.02
    assert [tuple(part.weight.shape) for part in one.main if isinstance(part, torch.nn.Conv2d)] == [
        (16, 3, 4, 4), (32, 16, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (1, 128, 4, 4),
    ]  # fmt: skip


def test_losses_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert hinge_loss(real, made).item() == 0.5 * (0.25 + 1.0)
    assert generator_loss(made).item() == 1.0
    ones = torch.ones(3, 3)
    assert adaptive_weight(ones, 2 * ones).item() == pytest.approx(3 / (6 + 1e-4))
    assert adaptive_weight(1e9 * ones, 0 * ones).item() == 1e4
    assert not adaptive_weight(ones.requires_grad_(), ones).requires_grad
