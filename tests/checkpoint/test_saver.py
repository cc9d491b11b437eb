"""Saving: in the background too, on a full disk, and what is kept; then going back to what is whole."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.files import damaged_part, drop_optimizer, missing_part, write_checksums
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import TRACKER, CheckpointConfig, RunConfig
from tests.families.eve import run_config
from tests.families.suite import run
from tests.layouts import ONE, PP2_VPP2, TP2_DP2, TP2_SP, Layout, layout, parametrize
from tests.ranks import RankError, RankPool

pytestmark = pytest.mark.distributed

DP2_OVERLAP = layout("DP2+overlap", 2, overlap_grad_reduce=True, overlap_param_gather=True)


def config_of(
    layout: Layout, save: Path, iterations: int = 6, load: bool = False, **settings: Any
) -> RunConfig:
    config = run_config(layout.parallel, iterations=iterations)
    pretrained = None if load else config.checkpoint.pretrained_checkpoint
    checkpoint = CheckpointConfig(
        save=str(save), load=str(save) if load else None, pretrained_checkpoint=pretrained, **settings
    )
    return replace(config, checkpoint=checkpoint)


def train_and_save(
    config: RunConfig, every: int, largest_file: int | None = None, reserve: int = 4096
) -> tuple[list[float], str]:
    """Runs on each rank: train to the end, saving now and then; the losses, and what was printed.

    Args:
        config: of the run.
        every: iterations between two saves.
        largest_file: bytes beyond which no file may grow, as on a disk that is full; lifted for the last save.
        reserve: bytes that are kept free for the last small files.
    """
    import contextlib
    import io

    from megatron_eve.checkpoint import store as checkpoint_store
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    losses, printed = [], io.StringIO()
    checkpoint_store._RESERVE_BYTES = reserve
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with model_parallel(config), contextlib.redirect_stdout(printed):
            trainer = setup(config)
            saver = CheckpointSaver(config)
            while trainer.train_state.iteration < config.total_iterations:
                losses.append(train_one(trainer).losses["lm loss"])
                saver.poll()
                last = trainer.train_state.iteration == config.total_iterations
                if largest_file:
                    limit = unlimited if last else (largest_file, unlimited[1])
                    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
                if last or trainer.train_state.iteration % every == 0:
                    saver.save(
                        trainer.train_state,
                        trainer.chunks,
                        trainer.optimizer,
                        trainer.data.fingerprint,
                        trainer.frozen,
                    )
            saver.finish()
            trainer.loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return losses, printed.getvalue()


def checkpoints(folder: Path) -> list[str]:
    """What lies in a run's folder."""
    return sorted(path.name for path in folder.iterdir())


@parametrize(PP2_VPP2, slow=(DP2_OVERLAP, TP2_DP2))
def test_the_background_writes_what_the_foreground_writes(
    ranks: RankPool, tmp_path: Path, layout: Layout
) -> None:
    """Training that goes on meanwhile changes nothing of what is written: a resume from it has the same losses."""
    found = []
    for background in (False, True):
        folder = tmp_path / str(background)
        config = config_of(layout, folder, iterations=4, async_save=background)
        results = ranks.run(layout.world_size, train_and_save, config, 2)
        assert checkpoints(folder) == ["iter_0000002", "iter_0000004", TRACKER]
        assert (folder / TRACKER).read_text() == "4"
        assert results[0][1].count("saved checkpoint at iteration") == 2
        CheckpointStore(folder)._write_tracker(2)
        again = config_of(layout, folder, iterations=4, load=True)
        assert ranks.run(layout.world_size, run, again)[-1].losses == results[-1][0][2:]
        found.append(results[-1][0])
    assert found[0] == found[1]


def test_users_can_check_the_sums(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, train_and_save, config_of(TP2_SP, tmp_path, iterations=1), 1)
    folder = tmp_path / "iter_0000001"
    files = {path.name for path in folder.iterdir() if path.suffix != ".sha256"}
    found = subprocess.run(
        "sha256sum -c *.sha256", shell=True, cwd=folder, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert {line.removesuffix(": OK") for line in found.stdout.splitlines()} == files


@pytest.mark.parametrize(
    ("background", "reserve"),
    [(False, 4096), (True, 4096), (False, 1 << 20)],
    ids=["foreground", "background", "no room for the reserve"],
)
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    ranks: RankPool, tmp_path: Path, background: bool, reserve: int
) -> None:
    """No file may grow beyond 100 KB (but for the last save); what was saved before is as it was."""
    first = config_of(TP2_SP, tmp_path, iterations=2)
    ranks.run(2, train_and_save, first, 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "iter_0000002").iterdir()}
    config = config_of(TP2_SP, tmp_path, iterations=4, load=True, async_save=background)
    losses, printed = ranks.run(2, train_and_save, config, 1, 100_000, reserve)[0]
    assert len(losses) == 2
    assert printed.count("the checkpoint of iteration 3 was not written: ") == 1
    assert printed.count("was not written") == 1
    assert f" GB are free for {tmp_path}" in printed
    assert {path.name: path.read_bytes() for path in (tmp_path / "iter_0000002").iterdir()} == before
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000004", TRACKER]
    assert (tmp_path / TRACKER).read_text() == "4"


def test_what_is_kept(ranks: RankPool, tmp_path: Path) -> None:
    """The newest two whole; of the older ones every second, weights alone."""
    settings = {"keep_last": 2, "save_retain_interval": 2, "retain_weights_only": True}
    ranks.run(2, train_and_save, config_of(TP2_SP, tmp_path, iterations=5, **settings), 1)
    names = ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert checkpoints(tmp_path) == [*names, TRACKER]
    stripped = [not list((tmp_path / name).glob("optimizer*")) for name in names]
    assert stripped == [True, False, False]
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in names]
    assert sizes[0] < 0.5 * sizes[1]

    # The weights of one that was stripped serve a new run, and are those of its iteration; a resume wants more.
    weights = CheckpointConfig(pretrained_checkpoint=str(tmp_path))
    losses = []
    for iteration in (2, 4):
        CheckpointStore(tmp_path)._write_tracker(iteration)
        losses.append(ranks.run(1, run, replace(run_config(ONE.parallel), checkpoint=weights), 1)[-1].losses)
    assert losses[0] != losses[1]
    CheckpointStore(tmp_path)._write_tracker(2)
    with pytest.raises(RankError, match="iter_0000002: it was kept without its optimizer state"):
        ranks.run(2, run, config_of(TP2_SP, tmp_path, load=True), 7)


def test_stripping_a_checkpoint_hides_no_damage_and_can_be_taken_up_again(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, train_and_save, config_of(TP2_SP, tmp_path, iterations=1), 1)
    folder = tmp_path / "iter_0000001"
    optimizer = {path: path.read_bytes() for path in folder.glob("optimizer*")}
    drop_optimizer(folder)
    assert missing_part(folder) is None and damaged_part(folder, 0, 1) is None
    for path, content in optimizer.items():  # as if killed before the files went
        path.write_bytes(content)
    harm_shard(folder)
    drop_optimizer(folder)
    assert not list(folder.glob("optimizer*"))
    assert missing_part(folder) is None
    assert "__0_0.distcp is damaged" in str(damaged_part(folder, 0, 1))


def test_a_damaged_checkpoint_does_not_end_the_removal_of_older_ones(tmp_path: Path) -> None:
    """Its index is a pickle that cannot be read; the others are dealt with, and it is named."""
    store = CheckpointStore(tmp_path)
    for iteration in (1, 2, 3, 4):
        whole(store, iteration)
        (store.folder(iteration) / "optimizer__0_1.distcp").write_bytes(b"state")
        (store.folder(iteration) / ".metadata").write_bytes(b"garbage")
    store._write_tracker(4)
    problems = store.prune(keep_last=1, retain_interval=2, weights_only=True)
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000004", TRACKER]
    (problem,) = problems
    assert "iter_0000002" in problem and "UnpicklingError" in problem


def test_readers_of_weights_alone_read_no_optimizer_state(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "optimizer__0_1.distcp"):
        (tmp_path / name).write_bytes(name.encode())
    write_checksums(tmp_path, "rank00000", ["__0_0.distcp", "optimizer__0_1.distcp"])
    (tmp_path / "optimizer__0_1.distcp").write_bytes(b"other bytes")
    assert damaged_part(tmp_path, 0, 1) is None
    assert "optimizer__0_1.distcp is damaged" in str(damaged_part(tmp_path, 0, 1, optimizer=True))
    (tmp_path / "__0_0.distcp").unlink()
    assert "__0_0.distcp cannot be read (No such file or directory)" in str(damaged_part(tmp_path, 0, 1))


def read_slowly(folder: Path) -> str | None:
    """Runs on each rank: look for damage where one rank reads for longer than collectives wait."""
    import time
    from datetime import timedelta
    from unittest import mock

    import torch
    from torch.distributed import distributed_c10d

    from megatron_eve.checkpoint import state as checkpoint

    real = checkpoint.compare_checksums

    def slow(*arguments: Any, **settings: Any) -> Any:
        for _ in range(15 if torch.distributed.get_rank() else 0):
            time.sleep(0.2)
            yield 0
        yield from real(*arguments, **settings)

    group = distributed_c10d._get_default_group()
    group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1.5))
    with (
        mock.patch.object(checkpoint, "compare_checksums", slow),
        mock.patch.object(checkpoint, "missing_part", lambda *_, **__: None),
        mock.patch.object(checkpoint, "_ROUND_SECONDS", 0.3),
    ):
        return checkpoint._problem(folder)


def test_a_rank_may_read_for_longer_than_collectives_wait(ranks: RankPool, tmp_path: Path) -> None:
    """Damage that the slow rank finds at the end of its share is known to all."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"as written")
    write_checksums(tmp_path, "rank00000", ["a", "b"])
    assert ranks.run(2, read_slowly, tmp_path) == [None, None]
    (tmp_path / "b").write_bytes(b"damaged")
    told = ranks.run(2, read_slowly, tmp_path)
    assert told[0] == told[1] and "b is damaged" in told[0]


def harm_shard(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


def harm_size(folder: Path) -> None:
    path = folder / "optimizer__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def harm_common(folder: Path) -> None:
    (folder / "common.pt").write_bytes(b"")


@pytest.mark.parametrize(
    "harm",
    [
        harm_shard,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (shutil.rmtree, harm_size, harm_common)),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    ranks: RankPool, tmp_path: Path, harm: Callable[[Path], Any]
) -> None:
    """The run goes back to the one before, says so, and overwrites the damaged one in its time."""
    whole = ranks.run(2, train_and_save, config_of(TP2_SP, tmp_path, iterations=4), 2)[-1][0]
    harm(tmp_path / "iter_0000004")
    again = config_of(TP2_SP, tmp_path, iterations=4, load=True)
    results = ranks.run(2, train_and_save, again, 2)
    assert "iter_0000004: " in results[0][1] and "going back to iteration 2" in results[0][1]
    assert results[-1][0] == whole[2:]
    assert ranks.run(2, run, again)[-1].losses == []


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new" / "run")
    free = shutil.disk_usage(tmp_path).free
    assert store.space_problem(free // 4, kept=2) is None
    problem = store.space_problem(free // 2, kept=2)
    assert problem is not None
    assert (
        str(tmp_path / "new" / "run") in problem
        and "3 checkpoints of about" in problem
        and "--keep-last" in problem
    )


def whole(store: CheckpointStore, iteration: int) -> None:
    store.folder(iteration).mkdir(parents=True)


def test_candidates_and_leftovers(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    assert store.candidates() == []
    for iteration in (5, 10, 15):
        whole(store, iteration)
    assert store.candidates() == [15, 10, 5]  # a copy may have left the tracker behind
    store._write_tracker(10)
    assert store.candidates() == [10, 5]
    (tmp_path / TRACKER).write_text("\0\0")
    assert store.candidates() == [15, 10, 5]
    with pytest.raises(CheckpointError, match="not an iteration"):
        store.latest()
    for name in ("iter_0000020.partial.abc", "iter_0000005.removed", "iter_0000010.replaced"):
        (tmp_path / name).mkdir()
    store.clear()
    assert checkpoints(tmp_path) == ["iter_0000005", "iter_0000010", "iter_0000015", TRACKER]


def test_two_writers_of_one_iteration_do_not_meet(tmp_path: Path) -> None:
    """What outlives a kill has a folder of its own, and writes into nothing once that is cleared away."""
    store = CheckpointStore(tmp_path)
    old = store.begin(7)
    store.clear()
    new = store.begin(7)
    assert old != new
    with pytest.raises(FileNotFoundError):
        write_checksums(old, "rank00000", [])


def test_a_kill_while_a_checkpoint_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    """Between its two names: it gets the old one back, and the run goes on from it."""
    config = config_of(ONE, tmp_path, iterations=2)
    losses, _ = ranks.run(1, train_and_save, config, 1)[0]
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000002.replaced")
    assert ranks.run(1, run, config_of(ONE, tmp_path, iterations=3, load=True))[0].losses != losses
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000002", TRACKER]
    # Where the new one has the name already, the old one is left over.
    shutil.copytree(tmp_path / "iter_0000002", tmp_path / "iter_0000002.replaced")
    store = CheckpointStore(tmp_path)
    store.recover()
    store.clear()
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000002", TRACKER]
