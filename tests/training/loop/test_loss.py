"""The normaliser: what megatron-core and DDP do to a loss, undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_eve.config import RunConfig
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.objectives import Aligning
from megatron_eve.models.model_parts import SampleCounts
from megatron_eve.training.loop.loss import Normalizer, objectives_of

# Packs of (losses of labelled rows, distances of images).
Pack = tuple[list[float], list[float]]
PACKS: list[Pack] = [([1.0, 2.0, 3.0], [0.5, 0.7]), ([10.0], []), ([], [0.9]), ([4.0, 4.0], [0.1])]


def pack(labels: list[int], images: int, drawn: Sequence[int] = ()) -> Any:
    """What is counted of a pack; each image has 3 rows, and those of these numbers are to be drawn."""
    return SimpleNamespace(
        labels=torch.tensor(labels),
        image_grids=torch.ones(images, 2),
        image_rows=torch.full((images,), 3),
        drawn=torch.tensor([image in drawn for image in range(images)], dtype=torch.bool),
    )


def shares(kind: str, packs: list[Pack], ranks: int, weight: float = 1.0) -> tuple[float, float, float]:
    """(loss as the schedule and DDP average it, sums of both reported shares) of packs dealt to ranks."""
    each = len(packs) // ranks
    normalizer = Normalizer(
        objectives=(NextToken(), Aligning(RunConfig(vision=EVEConfig(align_loss_weight=weight)))),
        counts=SampleCounts(
            labels=sum(len(labels) for labels, _ in packs), images=sum(len(images) for _, images in packs)
        ),
        num_packs=sum(bool(labels or images) for labels, images in packs),
        num_microbatches=each,
        data_parallel_size=ranks,
        kind=kind,  # type: ignore[arg-type]
    )
    averaged = language = aligning = 0.0
    for labels, images in packs:
        # A row more than there are labels: the batch is counted, not the losses.
        batch = pack([*[1] * len(labels), -100], len(images))
        losses = {"lm loss": torch.tensor(labels), "align loss": torch.tensor(sum(images))}
        loss, report = normalizer.loss_function(batch)(losses)
        language, aligning = language + float(report["lm loss"]), aligning + float(report["align loss"])
        loss /= each  # megatron-core, in place
        averaged += float(loss) / ranks  # DDP
    return averaged, language, aligning


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_global_means_over_labels_and_images(ranks: int) -> None:
    expected = (24 / 6 + 2.2 / 4, 24 / 6, 2.2 / 4)
    assert shares("global", PACKS, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_published_means_of_means(ranks: int) -> None:
    language, aligning = (2 + 10 + 0 + 4) / 4, (0.6 + 0 + 0.9 + 0.1) / 4
    assert shares("microbatch", PACKS, ranks) == pytest.approx((language + aligning, language, aligning))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_packs_that_only_fill_up_do_not_dilute(ranks: int) -> None:
    filled = [*PACKS, ([], []), ([], [])]
    for kind in ("global", "microbatch"):
        assert shares(kind, filled, ranks) == pytest.approx(shares(kind, PACKS, 1))


def test_the_weight_is_of_the_aligning_loss_alone() -> None:
    assert shares("global", PACKS, 2, weight=0.5) == pytest.approx((4 + 0.5 * 0.55, 4, 0.55))


@pytest.mark.parametrize("kind", ["global", "microbatch"])
def test_a_step_without_labels_and_images_is_zero(kind: str) -> None:
    assert shares(kind, [([], []), ([], [])], 2) == (0.0, 0.0, 0.0)


def test_without_an_aligning_layer_there_is_no_aligning_loss() -> None:
    batch = pack([1], 1)
    objectives = objectives_of(RunConfig())
    normalizer = Normalizer(objectives, SampleCounts(labels=1, images=1), 1, 1, 1)
    loss, report = normalizer.loss_function(batch)({"lm loss": torch.tensor([3.0])})
    assert float(loss) == 3.0 and set(report) == {"lm loss"}


def test_an_objective_that_this_package_does_not_know() -> None:
    """By name alone: its own weight, and a denominator of its own from what the step holds."""

    @dataclass(frozen=True)
    class Colour:
        name: str = "mean colour"
        weight: float = 10.0
        columns: tuple[str, ...] = ()
        adds_over_tensor_parallel: bool = False

        def count(self, counts: SampleCounts) -> int:
            return 3 * counts.images

    batch = pack([1, 1], 4)
    normalizer = Normalizer((NextToken(), Colour()), SampleCounts(labels=2, images=4), 1, 1, 1)
    loss, report = normalizer.loss_function(batch)(
        {"lm loss": torch.tensor([3.0, 5.0]), "mean colour": torch.tensor(6.0)}
    )
    assert float(loss) == 8 / 2 + 10 * 6 / 12
    assert {name: float(share) for name, share in report.items()} == {"lm loss": 4.0, "mean colour": 0.5}


@pytest.mark.parametrize("kind", ["global", "microbatch"])
def test_rows_of_images_to_draw_are_counted(kind: Any) -> None:
    """Two packs, with one and three images to draw, then a pack and a step without any: nothing is divided by zero."""

    @dataclass(frozen=True)
    class Codes:
        name: str = "visual loss"
        weight: float = 1.0
        columns: tuple[str, ...] = ()
        adds_over_tensor_parallel: bool = False

        def count(self, counts: SampleCounts) -> int:
            return 4 * counts.visual_labels

    packs = [(pack([1], 3, [1]), 12.0), (pack([1], 4, [0, 2, 3]), 72.0), (pack([1], 2), 0.0)]
    normalizer = Normalizer((Codes(),), SampleCounts(3, 9, 12), 3, 3, 1, kind)
    shares = [
        float(normalizer.loss_function(one)({"visual loss": torch.tensor(sum_)})[1]["visual loss"])
        for one, sum_ in packs
    ]
    assert sum(shares) == pytest.approx(84 / 48 if kind == "global" else (12 / 12 + 72 / 36 + 0) / 3)
    nothing = Normalizer((Codes(),), SampleCounts(3, 9), 3, 3, 1, kind)
    assert float(nothing.loss_function(packs[2][0])({"visual loss": torch.tensor(0.0)})[0]) == 0


@pytest.mark.parametrize("kind", ["global", "microbatch"])
def test_columns_are_reported_where_they_are_asked_for(kind: Any) -> None:
    """Two packs with 3 and 6 rows of two columns: the means of the columns, whose mean is the loss."""

    @dataclass(frozen=True)
    class Codes:
        name: str = "visual loss"
        weight: float = 2.0
        columns: tuple[str, ...] = ("first", "second")
        adds_over_tensor_parallel: bool = False

        def count(self, counts: SampleCounts) -> int:
            return 2 * counts.visual_labels

    packs = [(pack([1], 3, [1]), [[1.0, 3.0]] * 3), (pack([1], 2, [0, 1]), [[4.0, 6.0]] * 6)]
    means = {name: 0.0 for name in ("visual loss", "first", "second")}
    for batch, rows in packs:
        normalizer = Normalizer((Codes(),), SampleCounts(2, 5, 9), 2, 2, 1, kind, columns=True)
        _, report = normalizer.loss_function(batch)({"visual loss": torch.tensor(rows)})
        means = {name: mean + float(report[name]) for name, mean in means.items()}
        assert set(
            replace(normalizer, columns=False).loss_function(batch)({"visual loss": torch.tensor(rows)})[1]
        ) == {"visual loss"}
    first = 3.0 if kind == "global" else 2.5
    assert means == pytest.approx({"visual loss": first + 1, "first": first, "second": first + 2})


def test_the_family_says_what_is_trained_beside_the_next_token() -> None:
    config = RunConfig(vision=EVEConfig(patch_aligning=True, align_loss_weight=0.25))
    assert (
        objectives_of(config) == (NextToken(), Aligning(config)) and objectives_of(config)[1].weight == 0.25
    )
    assert objectives_of(RunConfig()) == (NextToken(),)
