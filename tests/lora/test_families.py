"""Adapters in every family: under layouts as on one process, and what else trains is what the family says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.models.family import ADAPTER_PARAMETERS, matches
from megatron_eve.models.registry import family_names, find_family
from tests.families.suite import run, saving_in
from tests.layouts import CP2, ONE, PP2, TP2, TP2_SP, TP2_SP_CP2, Layout, parametrize
from tests.lora.runs import FULL, Learned, learn, lora_config, starting_from
from tests.lora.test_layouts import agree, whole_gradients
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

FROZEN = (
    "embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.weight", "final_layernorm.weight",
    "output_layer.weight",
)  # fmt: skip


@pytest.fixture(scope="module")
def one_process(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Learned]]:
    """Weights with adapters that are no longer 0, and two steps from them on one process, by family."""
    known: dict[str, tuple[Path, Learned]] = {}

    def of(family: str) -> tuple[Path, Learned]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            ranks.run(1, run, saving_in(lora_config(family=family), folder), 1, True)
            alone = lora_config(whole_gradients(ONE), 2, family=family)
            known[family] = folder, ranks.run(1, learn, starting_from(alone, folder))[-1]
        return known[family]

    return of


@pytest.mark.parametrize("family", family_names())
@parametrize(TP2_SP, slow=(TP2, PP2, CP2, TP2_SP_CP2))
@pytest.mark.parametrize(
    "recompute", [{}, pytest.param(FULL, marks=pytest.mark.slow)], ids=["kept", "recomputed"]
)
def test_a_layout_changes_nothing(
    ranks: RankPool,
    one_process: Callable[[str], tuple[Path, Learned]],
    family: str,
    layout: Layout,
    recompute: dict[str, Any],
) -> None:
    folder, expected = one_process(family)
    config = starting_from(lora_config(whole_gradients(layout), 2, family=family, **recompute), folder)
    agree(ranks.run(layout.world_size, learn, config)[-1], expected)


@pytest.mark.parametrize("family", family_names())
def test_what_trains_is_adapters_and_what_the_stage_trains_beside_the_decoder(family: str) -> None:
    from megatron_eve.models.stages import stage_of

    adapted, some = lora_config(family=family), find_family(family)
    for stage in some.stages:
        with_adapters = replace(adapted, training=replace(adapted.training, stage=stage))
        plain = stage_of(replace(with_adapters, lora=replace(adapted.lora, lora_rank=None)))
        found = stage_of(with_adapters)
        for name in (
            "embedding.word_embeddings.weight",
            "decoder.layers.1.mlp.linear_fc1.weight",
            "output_layer.weight",
        ):
            assert not found.trains(name)
        assert found.trains("decoder.layers.3.mlp.linear_fc2.lora.b") == plain.decoder_trains
        for patterns in some.parts.values():
            for name in (pattern.replace("*", "0") for pattern in patterns):
                assert found.trains(name) == plain.trains(name) and not matches(name, (ADAPTER_PARAMETERS,))
