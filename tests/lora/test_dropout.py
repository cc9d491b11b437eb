"""Dropout of the adapters: zeros that agree where ranks hold the same rows, and differ where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_eve.config import RunConfig
from tests.layouts import CP2, DP2, ONE, PP2, TP2, TP2_SP
from tests.lora.runs import FULL, LORA, lora_config
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

DROPPING = replace(LORA, lora_dropout=0.5)


def zeros_of(config: RunConfig, consumed: int) -> dict[str, list[bool]]:
    """Runs on each rank: which values of a column-parallel and a row-parallel layer's input are set to zero."""
    import torch

    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.dropout import seed_dropout

    with model_parallel(config):
        (chunk,) = build_chunks(config)
        layer = chunk.decoder.layers[0]
        seed_dropout(config, consumed)
        found = {}
        for name, linear in (
            ("qkv", layer.self_attention.linear_qkv),
            ("proj", layer.self_attention.linear_proj),
        ):
            adapter, x = linear.lora, torch.ones(64)
            count = 3 if name == "qkv" else 1
            column = name == "qkv"
            same = not adapter.sequence_parallel if column else adapter.group.size() == 1
            masks = adapter.dropped(x, count, same_on_ranks=same)
            assert all(bool((mask == 0).any()) for mask in masks)
            found |= {f"{name}{i}": (mask == 0).tolist() for i, mask in enumerate(masks)}
        chunk.eval()
        assert bool((layer.self_attention.linear_qkv.lora.dropped(x, 1, same_on_ranks=True)[0] == 1).all())
        return found


def test_which_ranks_draw_the_same_zeros(ranks: RankPool) -> None:
    def draw(layout: object, consumed: int = 8) -> list[dict[str, list[bool]]]:
        found: list[dict[str, list[bool]]] = ranks.run(
            layout.world_size,
            zeros_of,
            lora_config(layout.parallel, lora=DROPPING),
            consumed,  # type: ignore[attr-defined]
        )
        return found

    (one,) = draw(ONE)
    assert len({tuple(mask) for mask in one.values()}) == 4  # each projection its own
    assert draw(ONE) == [one] and draw(ONE, 16) != [one]  # by the place in the order of samples
    first, second = draw(TP2)
    assert all(first[f"qkv{i}"] == second[f"qkv{i}"] for i in range(3))  # the same input
    assert first["proj0"] != second["proj0"]  # each a part of the input
    first, second = draw(TP2_SP)
    assert all(first[name] != second[name] for name in first)  # each its own rows
    for layout in (DP2, CP2, PP2):
        first, second = draw(layout)
        assert all(first[name] != second[name] for name in first), layout.name


def test_recomputation_draws_the_same_zeros(ranks: RankPool) -> None:
    from tests.lora.runs import learn

    for layout in (ONE, TP2_SP):
        plain, again = (
            ranks.run(layout.world_size, learn, lora_config(layout.parallel, 2, DROPPING, **training))[-1]
            for training in ({}, FULL)
        )
        assert plain.losses == again.losses
