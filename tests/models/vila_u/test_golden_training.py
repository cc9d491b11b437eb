"""VILA-U's golden batches: chunks of any size give the same, and what is wrong by a row or a depth is a miss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import ParallelConfig
from tests.families.vila_u_steps import Mutation
from tests.golden_dir import find_golden
from tests.layouts import ONE, TP2_SP_CP2, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


def misses_of(
    folder: Path, parallel: ParallelConfig, name: str, chunk: int | None, mutation: Mutation
) -> tuple[int, list[str]]:
    """Runs on each rank: how many rows a batch has, and those that are out of tolerance."""
    from megatron_eve.models.registry import find_family
    from megatron_eve.verification.cases import batch_case
    from megatron_eve.verification.model_cases import check_model_case
    from tests.families.vila_u_steps import mutate

    (batch,) = [one for one in find_family("vila_u").golden().batches(folder) if one.name == name]
    batch = replace(batch, settings={**batch.settings, "visual_loss_chunk": chunk})
    mutate(mutation)
    try:
        rows = check_model_case(batch_case(folder, batch), parallel)
    finally:
        mutate("")
    return len(rows), [row.name.removeprefix(f"{name}.") for row in rows if not row.ok]


@pytest.mark.parametrize(
    ("chunk", "layout"),
    [
        pytest.param(1, ONE, id="1-TP1"),
        pytest.param(7, TP2_SP_CP2, id="7-TP2+SPxCP2"),
        pytest.param(None, ONE, id="all-TP1"),
        pytest.param(7, ONE, id="7-TP1", marks=pytest.mark.slow),
        pytest.param(1, TP2_SP_CP2, id="1-TP2+SPxCP2", marks=pytest.mark.slow),
        pytest.param(None, TP2_SP_CP2, id="all-TP2+SPxCP2", marks=pytest.mark.slow),
    ],
)
def test_chunks_of_positions(ranks: RankPool, chunk: int | None, layout: Layout) -> None:
    folder = find_golden("golden/vila/vilau_llm_train")
    count, missed = ranks.run(layout.world_size, misses_of, folder, layout.parallel, "mixed", chunk, "")[0]
    assert (count, missed) == (114, [])


@pytest.mark.parametrize("mutation", ["targets", "sees itself", "not summed"])
def test_a_mistake_is_a_miss(ranks: RankPool, mutation: Mutation) -> None:
    folder = find_golden("golden/vila/vilau_llm_train")
    _, missed = ranks.run(1, misses_of, folder, ONE.parallel, "mixed", None, mutation)[0]
    gradient = "grad.vision_tower.rqtransformer.in_mlp_2.weight"
    assert {"image_loss", "image_logits.3", gradient} <= set(missed)
    assert ("image_targets.3" in missed) == (mutation == "targets")
