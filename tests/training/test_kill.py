"""Runs that are killed at random moments and go on under another layout see what an uninterrupted run sees."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_eve.config import TRACKER
from tests.data.helpers import write_dataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed


class Runs:
    """Starts the command on one blend of two datasets."""

    def __init__(self, folder: Path, iterations: int) -> None:
        data = ["0.7", write_dataset(folder / "a", 23, 0), "0.3", write_dataset(folder / "b", 9, 1)]
        self._words = [
            "-m", "megatron_eve.pretrain", "--preset", "eve_mini", "--global-batch-size", "6", "--seq-length", "384",
            "--train-iters", str(iterations), "--save-interval", "3", "--lr", "4e-5", "--data-path", *data,
        ]  # fmt: skip

    def start(self, save: Path, data_parallel: int) -> subprocess.Popen[bytes]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={data_parallel}"]
        return subprocess.Popen(
            [sys.executable, *launcher, *self._words, "--save", str(save), "--load", str(save)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=(save.parent / f"{save.name}.err").open("ab"),
        )


def kill(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL to torchrun and to its ranks, which have sessions of their own; gives how many there were."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(family, timeout=10)
    process.wait()
    return len(family)


def lines_of(save: Path) -> list[dict[str, Any]]:
    """The whole lines of losses.jsonl; a kill may have cut the last one."""
    path = save / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def resumes_at(save: Path) -> int:
    """The iteration that the next start goes on from."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again(tmp_path: Path, kills: int) -> None:
    """SIGKILL at any moment to every process of DP 2, which goes on as DP 4 or DP 1: the same samples in order."""
    iterations = 3 * kills + 2
    runs, moments = Runs(tmp_path, iterations), random.Random(kills)
    assert runs.start(tmp_path / "whole", 1).wait(300) == 0, (tmp_path / "whole.err").read_text()[-2000:]
    whole = {line["iteration"]: line for line in lines_of(tmp_path / "whole")}
    assert sorted(whole) == list(range(1, iterations + 1))
    assert len({line["sample_ids_sha256"] for line in whole.values()}) == iterations

    save, done = tmp_path / "killed", 0
    for leg in range(kills):
        known, resumed = len(lines_of(save)), resumes_at(save)
        ranks = (2, 4, 2, 1)[leg % 4]
        process = runs.start(save, ranks)
        try:
            wanted = known + moments.choice((1, 2, 4, 5))
            while len(lines_of(save)) < wanted and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0.0, 0.5))  # in a step, in a save, or between them
        finally:
            done += process.poll() is None and kill(process) > ranks
        fresh = lines_of(save)[known:]
        assert not fresh or fresh[0]["iteration"] == resumed + 1
    known, resumed = len(lines_of(save)), resumes_at(save)
    assert resumed > 0  # so that the last start is a resume, and from the last checkpoint
    assert runs.start(save, 1).wait(300) == 0, (tmp_path / "killed.err").read_text()[-2000:]

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
