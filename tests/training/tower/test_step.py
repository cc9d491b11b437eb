"""A step of a tower's training against the plain one: the same numbers, however many ranks share the batch."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_eve.models.towers.tower_training import TowerTraining
from tests.ranks import RankPool
from tests.training.tower.mutations import MUTATIONS
from tests.training.tower.plain_step import PlainStep, PlainTower
from tests.training.tower.towers import LR, PAIRS, SEED, SIGLIP, STEPS, Case, bad_step, few_steps, pairs

pytestmark = pytest.mark.distributed

SHARED = Case()
# More codes than vectors, codebooks of their own, another grid for the pixel decoder, and what else is not the default.
OTHER = Case(
    codes=120,
    shared=False,
    resized=True,
    training=TowerTraining(
        contrastive_weight=0.5,
        reconstruction_weight=2.0,
        perceptual_weight=0.3,
        gan_start=1,
        contrastive_path="unquantized",
    ),
)
# Of float64 sums in another order, over three steps of Adam.
TOLERANCE = 1e-8


def differences(case: Case, answers: list[dict[str, Any]]) -> list[str]:
    """Where ours is not the plain one: what, step, and how far."""
    ours = answers[0]
    tower, discriminator = ours["start"]
    plain = PlainStep(PlainTower(case.settings, SIGLIP, tower, discriminator), case.training, LR, SEED)
    restarted = []
    found: list[str] = []
    for number, (losses, gradients) in enumerate(ours["steps"]):
        wanted, wanted_gradients = plain(*pairs(number))
        squares = {True: 0.0, False: 0.0}
        for name, gradient in wanted_gradients.items():
            squares[name.startswith("discriminator.")] += float(gradient.square().sum())
        wanted |= {"grad norm": squares[False] ** 0.5}
        if squares[True]:
            wanted["discriminator grad norm"] = squares[True] ** 0.5
        for name, loss in wanted.items():
            # megatron-core adds norms up in float32.
            tolerance = 1e-6 if name.endswith("norm") else TOLERANCE
            if not abs(losses[name] - loss) <= tolerance * max(abs(loss), 1e-3):
                found.append(f"step {number}: {name} {losses[name]} {loss}")
        assert set(losses) == set(wanted)
        for name, gradient in wanted_gradients.items():
            name = name.replace("discriminator.", "discriminator.main.")
            # Key biases have no true gradient: rounding is left of them.
            if not (gradients[name] - gradient).norm() <= TOLERANCE * gradient.norm() + 1e-12:
                found.append(f"step {number}: gradient of {name}")
        restarted.append(min(int((b.counts == 1).sum()) for b in plain.tower.codebooks.values()))
    assert min(restarted) > 0
    for name, buffer in plain.buffers().items():
        mine = ours["buffers"][name]
        mine = mine[:-1] if name.startswith("quantizer.") and name.endswith(".weight") else mine
        if not (mine.double() - buffer).norm() <= TOLERANCE * buffer.double().norm():
            found.append(f"buffer {name}")
    for other in answers[1:]:
        assert other["steps"][-1][0] == ours["steps"][-1][0]
    return found


@pytest.mark.parametrize(
    "slices",
    [
        pytest.param([6], id="DP1", marks=pytest.mark.slow),
        pytest.param([4, 2], id="DP2"),
        pytest.param([2, 1, 2, 1], id="DP4", marks=pytest.mark.slow),
    ],
)
def test_equals_the_plain_step(ranks: RankPool, slices: list[int]) -> None:
    answers = ranks.run(len(slices), few_steps, SHARED, slices)
    assert len(answers[0]["steps"]) == STEPS and sum(slices) == PAIRS
    assert differences(SHARED, answers) == []


def test_other_settings_equal_the_plain_step(ranks: RankPool) -> None:
    answers = ranks.run(2, few_steps, OTHER, [3, 3])
    assert differences(OTHER, answers) == []
    first, second = (losses for losses, _ in answers[0]["steps"][:2])
    assert "generator loss" not in first and "generator loss" in second


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_noticed(ranks: RankPool, mutation: str) -> None:
    answers = ranks.run(2, few_steps, SHARED, [4, 2], mutation)
    for answer in answers:  # ranks may disagree, which is part of the mistake
        answer["steps"][-1] = answers[0]["steps"][-1]
    assert differences(SHARED, answers)


def test_a_bad_step_changes_neither_weights_nor_codebooks_nor_statistics(ranks: RankPool) -> None:
    ((changed, why),) = ranks.run(1, bad_step, SHARED)
    assert why is not None and why.startswith("the reconstruction loss is") and changed == []
