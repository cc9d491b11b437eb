"""A slow rank is found, beside those that do the same work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_eve.config import LoggingConfig, RunConfig
from megatron_eve.training.monitoring.stragglers import RankTimes, compare
from tests.families.eve import run_config
from tests.layouts import DP2
from tests.ranks import RankPool


def test_ranks_are_compared_within_their_stage() -> None:
    """The last stage works longer, by right; rank 1 of the first does not."""
    times = [
        RankTimes("node1", stage=0, forward=1.0, data=0.1),
        RankTimes("node1", stage=0, forward=1.6, data=0.1),
        RankTimes("node2", stage=0, forward=1.0, data=0.1),
        RankTimes("node2", stage=1, forward=3.0, data=0.0),
        RankTimes("node3", stage=1, forward=3.3, data=0.0),
        RankTimes("node3", stage=1, forward=2.9, data=0.0),
    ]
    assert compare(times) == (
        " stragglers | forward: rank 1 on node1 1600.0 ms, 1.60 x the median of its pipeline stage |"
        " data: rank 0 on node1 100.0 ms, 1.00 x the median of its pipeline stage |"
    )


def report(config: RunConfig, slow: int) -> list[str]:
    """Runs on each rank: two steps with a rank whose decoder layers take longer; a report after each."""
    import time

    import torch

    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        if torch.distributed.get_rank() == slow:
            trainer.chunks[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
        reports = []
        for _ in range(2):
            train_one(trainer)
            assert trainer.stragglers is not None
            reports.append(trainer.stragglers.report())
        trainer.loader.close()
    return reports


@pytest.mark.distributed
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_is_named(ranks: RankPool, slow: int) -> None:
    config = replace(run_config(DP2.parallel), logging=LoggingConfig(log_straggler=True))
    first, last = ranks.run(2, report, config, slow)
    assert first == last
    forward = first[1].split("|")[1]
    assert f" forward: rank {slow} on " in forward
    ratio = float(forward.split(" x the median")[0].split()[-1])
    assert 1.2 < ratio <= 2.0  # of two ranks' times, the slower is at most twice the median
