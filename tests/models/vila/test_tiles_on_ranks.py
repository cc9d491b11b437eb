"""The tiles of a pack are shared out over the ranks that share it: each decodes and computes its share, and no more."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from megatron_eve.config import ParallelConfig
from tests.families.vila_steps import Run
from tests.layouts import CP2, ONE, TP2, TP2_CP2, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


class Pack(NamedTuple):
    """A pack of a step on a rank.

    Attributes:
        tiles: of all its pictures.
        decoded: tiles in the views of this rank.
        computed: tiles that went through the tower.
    """

    tiles: int
    decoded: int
    computed: int


def packs_of_a_step(parallel: ParallelConfig) -> list[Pack]:
    """Runs on each rank: forward and backward of a step of pictures in tiles."""
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.data import build_loader, data_in_memory
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.step import forward_backward
    from megatron_eve.training.loop.wrap import wrap_for_training
    from megatron_eve.verification.case_run import CaseDataset

    run = Run("tiles", trained=False)
    config = run.config(parallel)
    with model_parallel(config):
        bare = build_chunks(config)
        computed: list[int] = []
        front_end = bare[0].vision_model
        front_end.tower.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
        chunks = wrap_for_training(config, bare)
        loader = build_loader(config, data_in_memory(config, CaseDataset(run.case())))
        step = loader.step(0)
        forward_backward(chunks, step, Normalizer.of(step, objectives_of(config)), {})
        found = [
            Pack(len(batch.image_rows), len(batch.pixels["tower"]), count)
            for batch, count in zip(step.batches, computed, strict=True)
        ]
        loader.close()
    return found


@parametrize(ONE, TP2, CP2, slow=(TP2_CP2,))
def test_each_rank_has_its_share_of_the_tiles(ranks: RankPool, layout: Layout) -> None:
    by_rank = ranks.run(layout.world_size, packs_of_a_step, layout.parallel)
    packs = list(zip(*by_rank, strict=True))
    assert len(packs) > 1 and sum(of_ranks[0].tiles for of_ranks in packs) == 1 + 3 + 3 + 5 + 3
    for of_ranks in packs:
        tiles = of_ranks[0].tiles
        assert all(one.tiles == tiles and one.decoded == one.computed for one in of_ranks)
        assert sum(one.computed for one in of_ranks) == tiles
        assert max(one.computed for one in of_ranks) == math.ceil(tiles / layout.world_size)
