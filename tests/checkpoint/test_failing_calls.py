"""Saving while file operations fail, one after the other: the run goes on, and the checkpoint before stays whole.

The operations fail in a library that is loaded before all others (failing_calls.c), so that those of torch's C++ and of
forked processes do too. One run saves again and again; the n-th operation fails in the n-th save.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_eve.checkpoint.files import damaged_part, missing_part
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import RunConfig
from tests.checkpoint.test_saver import config_of
from tests.families.suite import run
from tests.layouts import DP2, TP2_DP2, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

_STATE = struct.Struct("5q")
_ENDLESS = 1 << 62
PARTS = 16


class Failing:
    """Which operations under the folder fail; shared by all processes of a run (see failing_calls.c)."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), _STATE.size)

    def set(self, first: int = 0, last: int = 0, error: int = 0) -> None:
        self._memory[:] = _STATE.pack(0, first, last, error, 0)

    def counts(self) -> tuple[int, int]:
        """Operations since `set`, and how many of them failed."""
        count, _, _, _, failed = _STATE.unpack(self._memory)
        return count, failed


@dataclass
class Outcome:
    """What came of a save: number of the call that was to fail, calls in all, those that failed, what is wrong."""

    number: int
    calls: int
    failed: int
    problem: str | None
    saved: bool


def save_and_fail(
    config: RunConfig, state: Path, numbers: list[int], error: int, to_the_end: bool, part: int
) -> list[Outcome]:
    """Runs on each rank: one save that succeeds, then one for each number of a call that fails in it.

    Args:
        config: of the run.
        state: shared with the library.
        numbers: of the calls, counted from 1, or from -1 backwards.
        part: without numbers: of all calls, every sixteenth from this on.
        error: errno.
        to_the_end: all calls after the one that fails do too, until the save is over.
    """
    import contextlib
    import io

    import torch

    from megatron_eve.checkpoint import store as checkpoint_store
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    checkpoint_store._RESERVE_BYTES = 4096
    assert config.checkpoint.save
    failing, store = Failing(state), CheckpointStore(config.checkpoint.save)
    main = torch.distributed.get_rank() == 0
    outcomes: list[Outcome] = []
    with model_parallel(config), contextlib.redirect_stdout(io.StringIO()):
        trainer = setup(config)
        train_one(trainer)
        saver = CheckpointSaver(config)

        def save(iteration: int) -> None:
            samples = iteration * config.training.global_batch_size
            trainer.train_state = replace(trainer.train_state, iteration=iteration, consumed_samples=samples)
            saver.save(
                trainer.train_state,
                trainer.chunks,
                trainer.optimizer,
                trainer.data.fingerprint,
                trainer.frozen,
            )
            saver.finish()

        if main:
            failing.set()
        torch.distributed.barrier()
        save(1)
        torch.distributed.barrier()
        calls, _ = failing.counts()
        torch.distributed.barrier()
        # Some more are made by a save that also removes an older checkpoint.
        every = range(1 + part, calls + calls // 20, PARTS)
        for number in [one if one > 0 else calls + 1 + one for one in numbers] or every:
            if main:
                failing.set(number, _ENDLESS if to_the_end else number, error)
            torch.distributed.barrier()
            iteration = trainer.train_state.iteration + 1
            save(iteration)
            torch.distributed.barrier()
            calls, failed = failing.counts()
            torch.distributed.barrier()
            problem = None
            if main:
                failing.set()
                latest = store.latest()
                assert latest is not None
                folder = store.folder(latest)
                problem = missing_part(folder, optimizer=True) or damaged_part(folder, 0, 1)
            outcomes.append(Outcome(number, calls, failed, problem, saver.last == iteration))
            torch.distributed.barrier()
        train_one(trainer)
        save(trainer.train_state.iteration)
        assert saver.last == trainer.train_state.iteration
        trainer.loader.close()
    return outcomes


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler (cc)")
    path = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", path, source, "-ldl"], check=True)
    return path


@dataclass
class Bench:
    """Ranks under the library, and the folder that it watches."""

    ranks: RankPool
    folder: Path
    state: Path
    environment: dict[str, str]

    def run(
        self,
        layout: Layout,
        numbers: list[int],
        error: int,
        background: bool,
        to_the_end: bool = False,
        part: int = 0,
    ) -> list[Outcome]:
        with mock.patch.dict(os.environ, self.environment):
            self.ranks._start(layout.world_size)
        save = self.folder / f"run{len(list(self.folder.iterdir()))}"
        config = config_of(layout, save, iterations=1 << 20, async_save=background, keep_last=1)
        found = self.ranks.run(
            layout.world_size, save_and_fail, config, self.state, numbers, error, to_the_end, part
        )
        for outcomes in found:
            assert [outcome.saved for outcome in outcomes] == [outcome.saved for outcome in found[0]]
        wrong = [outcome for outcome in found[0] if outcome.problem]
        assert not wrong, wrong
        # All ranks read it.
        again = config_of(layout, save, iterations=1 << 20, load=True)
        self.ranks.run(layout.world_size, run, again, CheckpointStore(save).latest())
        return found[0]


@pytest.fixture(scope="module")
def bench(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    place = tmp_path_factory.mktemp("failing")
    folder, state = place / "save", place / "state"
    folder.mkdir()
    state.write_bytes(bytes(_STATE.size))
    environment = {"LD_PRELOAD": str(library), "FAILING_FOLDER": f"{folder}/", "FAILING_STATE": str(state)}
    ranks = RankPool()
    yield Bench(ranks, folder, state, environment)
    ranks.close()


@pytest.mark.parametrize(
    ("numbers", "background", "to_the_end"),
    [
        ([1, 3, 6, 200, -70, -5], False, False),
        ([2, 7, 500, -50], True, False),
        pytest.param([5, -60], True, True, marks=pytest.mark.slow),
    ],
    ids=["foreground", "background", "all that follow"],
)
@pytest.mark.slow
def test_a_dozen_of_the_calls(bench: Bench, numbers: list[int], background: bool, to_the_end: bool) -> None:
    """The first ones of the first rank alone, some of the tensors', and the last ones, which give the name."""
    outcomes = bench.run(DP2, numbers, errno.ENOSPC, background, to_the_end)
    assert all(outcome.failed for outcome in outcomes)
    # Some calls matter to nobody: to make a folder that is there, to remove an older checkpoint.
    assert not all(outcome.saved for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("part", range(PARTS))
def test_every_call(bench: Bench, background: bool, part: int) -> None:
    """Every sixteenth at a time: a test that takes longer than the ranks' time-out counts as one that hangs."""
    bench.run(DP2, [], errno.ENOSPC, background, part=part)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
@pytest.mark.parametrize("error", [errno.EDQUOT, errno.EIO, errno.EACCES, errno.ENOENT])
@pytest.mark.parametrize("to_the_end", [False, True], ids=["one", "all that follow"])
@pytest.mark.parametrize("layout", [DP2, TP2_DP2], ids=["2 ranks", "4 ranks"])
def test_other_errors(bench: Bench, layout: Layout, error: int, background: bool, to_the_end: bool) -> None:
    """ENOENT is what a mount that vanishes leaves."""
    numbers = [1, 2, 4, 5, 7, 8, 9, 50, 300, -80, -60, -45, -30, -15, -4, -1]
    bench.run(layout, numbers, error, background, to_the_end)
