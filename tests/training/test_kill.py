"""Runs that are killed at random moments and go on under another layout see what an uninterrupted run sees."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.training.killed_runs import Runs, lines_of, resumes_at

pytestmark = pytest.mark.distributed


# Four ranks on two cores that others want too may need more than the ten minutes that a test has.
MANY = pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.slow), MANY])
def test_a_run_that_is_killed_again_and_again(tmp_path: Path, kills: int) -> None:
    """SIGKILL at any moment to every process of DP 2, which goes on as DP 4 or DP 1: the same samples in order."""
    iterations = 3 * kills + 2
    runs, moments = Runs(tmp_path, iterations), random.Random(kills)
    uninterrupted = runs.start(tmp_path / "whole", 1)
    assert uninterrupted.torchrun.wait(300) == 0, uninterrupted.output()[-2000:]
    whole = {line["iteration"]: line for line in lines_of(tmp_path / "whole")}
    assert sorted(whole) == list(range(1, iterations + 1))
    assert len({line["sample_ids_sha256"] for line in whole.values()}) == iterations

    save, done = tmp_path / "killed", 0
    for leg in range(kills):
        known, resumed = len(lines_of(save)), resumes_at(save)
        ranks = (2, 4, 2, 1)[leg % 4]
        run = runs.start(save, ranks)
        try:
            wanted = known + moments.choice((1, 2, 4, 5))
            while len(lines_of(save)) < wanted and run.torchrun.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 0.5))  # in a step, in a save, or between them
        finally:
            done += run.torchrun.poll() is None and run.kill() > ranks
        fresh = lines_of(save)[known:]
        assert not fresh or fresh[0]["iteration"] == resumed + 1
    known, resumed = len(lines_of(save)), resumes_at(save)
    assert resumed > 0  # so that the last start is a resume, and from the last checkpoint
    last = runs.start(save, 1)
    assert last.torchrun.wait(300) == 0, last.output()[-2000:]

    lines = lines_of(save)
    assert not lines[known:] or lines[known]["iteration"] == resumed + 1
    assert done >= kills - 1  # a leg may have come to the end of the run before its moment
    assert {line["iteration"] for line in lines} == set(whole)
    assert len(lines) > iterations or kills < 10  # kills threw work away, which was done again
    for line in lines:
        expected = whole[line["iteration"]]
        for name in ("sample_ids_sha256", "consumed_samples", "tokens", "labels", "images"):
            assert line[name] == expected[name], (line["iteration"], name)
        # What the batches held, pixels and all: the loss tells.
        assert line["lm_loss"] == pytest.approx(expected["lm_loss"], abs=1e-5, rel=0)


def test_nothing_outlives_a_rank_that_is_killed(tmp_path: Path) -> None:
    """torchrun ends the other rank, and what both have started ends by itself: writers and megatron-core's helper."""
    save = tmp_path / "killed"
    run = Runs(tmp_path, 1000, "--async-save").start(save, 2)
    try:
        while resumes_at(save) == 0 and run.torchrun.poll() is None:
            time.sleep(0.02)
        ranks, family = run.ranks(), run.everything()
        assert len(ranks) == 2, run.output()[-2000:]
        assert len(family) >= 5  # torchrun, and a helper for each rank
        ranks[0].kill()
        assert run.torchrun.wait(60) != 0
        assert run.outlives(20) == []
    finally:
        run.kill()
