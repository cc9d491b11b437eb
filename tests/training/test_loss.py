"""The normaliser: what megatron-core and DDP do to a loss, undone."""

from __future__ import annotations

import pytest
import torch

from megatron_eve.training.loss import Normalizer


def shares(kind: str, packs: list[list[float]], ranks: int) -> tuple[float, float]:
    """(loss as the schedule and DDP average it, sum of the reported shares) of packs dealt to ranks."""
    labels = sum(len(pack) for pack in packs)
    each = len(packs) // ranks
    normalizer = Normalizer(labels, each, ranks, kind)  # type: ignore[arg-type]
    averaged = reported = 0.0
    for pack in packs:
        loss, report = normalizer.language_loss()(torch.tensor(pack))
        reported += float(report["lm loss"])
        loss /= each  # megatron-core, in place
        averaged += float(loss) / ranks  # DDP
    return averaged, reported


PACKS = [[1.0, 2.0, 3.0], [10.0], [], [4.0, 4.0]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_mean_over_labels(ranks: int) -> None:
    averaged, reported = shares("global", PACKS, ranks)
    assert averaged == pytest.approx(24 / 6)
    assert reported == pytest.approx(24 / 6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_published_mean_of_means(ranks: int) -> None:
    averaged, reported = shares("microbatch", PACKS, ranks)
    assert averaged == pytest.approx((2 + 10 + 0 + 4) / 4)
    assert reported == pytest.approx((2 + 10 + 0 + 4) / 4)


def test_a_step_without_labels_is_zero() -> None:
    assert shares("global", [[], []], 2) == (0.0, 0.0)
