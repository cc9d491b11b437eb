"""Two runs never write into one folder; what a killed run leaves of its lock stops nobody. And the word left there."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint import save_lock
from megatron_eve.checkpoint.save_lock import LOCK, FolderInUseError, SaveLock, in_use
from megatron_eve.runtime.errors import UserError
from megatron_eve.training.faults.exit_reason import write_exit_reason
from tests.ranks import RankPool

RIVALS, ROUNDS = 3, 20
HOLD = "import sys, time\nfrom megatron_eve.checkpoint.save_lock import SaveLock\nSaveLock(sys.argv[1])\n"
HOLD += "print('held', flush=True)\ntime.sleep(60)"


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def _write(folder: Path, seconds_ago: float = 0.0, **changed: Any) -> None:
    """Leave a lock of this process, or of another that is described."""
    lock = SaveLock(folder)
    holder = json.loads((folder / LOCK).read_text())
    lock.release()
    (folder / LOCK).write_text(json.dumps(holder | changed))
    then = time.time() - seconds_ago
    os.utime(folder / LOCK, (then, then))


def _rival(folder: Path, barrier: Any, answers: Any) -> None:
    """Tries again and again to have a folder at the same moment as others."""
    for number in range(ROUNDS):
        barrier.wait()
        lock, message = None, ""
        try:
            lock = SaveLock(folder / str(number))
        except FolderInUseError as error:
            message = str(error)
        barrier.wait()
        answers.put((number, os.getpid(), message))
        if lock:
            lock.release()


@pytest.mark.parametrize("stale", [False, True])
def test_of_processes_that_start_at_the_same_moment_one_wins(tmp_path: Path, stale: bool) -> None:
    for number in range(ROUNDS):
        (tmp_path / str(number)).mkdir()
        if stale:
            _write(tmp_path / str(number), started=1)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(RIVALS), context.Queue()
    rivals = [context.Process(target=_rival, args=(tmp_path, barrier, answers)) for _ in range(RIVALS)]
    for rival in rivals:
        rival.start()
    found = [answers.get(timeout=60) for _ in range(RIVALS * ROUNDS)]
    for rival in rivals:
        rival.join()
    for number in range(ROUNDS):
        (winner,) = [pid for round_, pid, message in found if round_ == number and not message]
        losers = [message for round_, _, message in found if round_ == number and message]
        assert all(f"{tmp_path / str(number)}: in use by PID {winner} on " in message for message in losers)
        assert list((tmp_path / str(number)).iterdir()) == []  # released, and nothing else is left


def test_a_process_that_was_killed_stops_nobody(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(
            FolderInUseError, match=f"in use by PID {holder.pid} on .* since 20.*; end that run, or"
        ):
            SaveLock(tmp_path)
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
        SaveLock(tmp_path).release()
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("changed", "seconds_ago", "job", "alive"),
    [
        ({}, 1000, None, True),  # a process that was suspended, say
        ({"pid": 2**22 + 1}, 0, None, False),
        ({"started": 1}, 0, None, False),  # its number is another process's by now
        ({"system": "another"}, 100, None, True),
        ({"system": "another"}, 130, None, False),
        ({"system": None}, 100, None, True),
        ({"system": "another", "slurm_job_id": "7"}, 0, "7", False),  # requeued
        ({"system": "another", "slurm_job_id": "7"}, 0, "8", True),
        ({"slurm_job_id": "7"}, 0, "7", True),  # two runs in one job
        ({"extra": 1}, 0, None, True),
        ({"extra": 1}, 130, None, False),
    ],
)
def test_which_locks_are_stale(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    seconds_ago: float,
    job: str | None,
    alive: bool,
) -> None:
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    _write(
        tmp_path,
        seconds_ago,
        **{"pid": os.getppid(), "started": save_lock._process_start(os.getppid()), **changed},
    )
    if not alive:
        assert in_use(tmp_path) is None
        SaveLock(tmp_path).release()
        return
    before = (tmp_path / LOCK).read_text()
    with pytest.raises(FolderInUseError) as raised:
        SaveLock(tmp_path)
    message = str(raised.value)
    assert (
        "in use by an unknown process" if "extra" in changed else f"in use by PID {os.getppid()} on"
    ) in message
    assert in_use(tmp_path) == (None if changed.get("slurm_job_id") == job is not None else message)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    assert (tmp_path / LOCK).read_text() == before


def test_a_takeover_that_was_cut_short_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, started=1)
    (tmp_path / "lock.takeover").write_bytes((tmp_path / LOCK).read_bytes())
    SaveLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(save_lock, "_TAKEOVER_SECONDS", 0.1)
    _write(tmp_path, started=1)
    (tmp_path / "lock.takeover").write_text("{}")  # of a process that may live
    with pytest.raises(FolderInUseError, match="an unknown process"):
        SaveLock(tmp_path)


def test_the_lock_stays_young_until_another_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(save_lock, "HEARTBEAT_SECONDS", 0.02)
    lock = SaveLock(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))
    _wait(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
    (tmp_path / LOCK).write_text("of another")
    _wait(lambda: not [one for one in threading.enumerate() if one.name == "save lock"])
    assert f"warning: {tmp_path / LOCK} is another run's now" in capfd.readouterr().out
    lock.release()
    assert (tmp_path / LOCK).read_text() == "of another"


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _hold(folder: Path, full_disk: bool = False) -> tuple[str, str, bool]:
    """Runs on each rank: hold the lock; the error, what was printed, and whether there was a lock meanwhile."""
    import contextlib
    import io

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    printed, held, link = io.StringIO(), False, os.link
    if full_disk:
        os.link = no_room  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(printed), save_lock.save_lock(str(folder)):
            import torch

            held = (folder / LOCK).exists()
            torch.distributed.barrier()
    except FolderInUseError as error:
        return str(error), printed.getvalue(), held
    finally:
        os.link = link
    return "", printed.getvalue(), held


@pytest.mark.distributed
def test_all_ranks_hear_of_it_alike(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, _hold, tmp_path / "free") == [("", "", True)] * 2
    assert list((tmp_path / "free").iterdir()) == []
    full = ranks.run(2, _hold, tmp_path / "full", True)
    assert [(message, held) for message, _, held in full] == [("", False)] * 2
    assert full[0][1].startswith(
        f"warning: {tmp_path / 'full'} could not be locked (No space left on device): "
    )
    assert full[1][1] == ""
    lock = SaveLock(tmp_path / "taken")
    first, second = ranks.run(2, _hold, tmp_path / "taken")
    lock.release()
    assert first == second
    assert f"in use by PID {os.getpid()} on " in first[0]


def test_the_word_that_ranks_leave(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = tmp_path / "run" / "outcome"
    write_exit_reason(str(tmp_path / "run"), "of a run that nobody launched")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    write_exit_reason(str(tmp_path / "run"), "of the first rank", replace=False)
    write_exit_reason(str(tmp_path / "run"), "too late", replace=False)
    assert outcome.read_text() == "of the first rank\n"
    write_exit_reason(str(tmp_path / "run"), "done")
    assert outcome.read_text() == "done\n"
    _write(tmp_path / "run", system="another")
    write_exit_reason(str(tmp_path / "run"), "of a run that was refused, as another has the folder")
    assert outcome.read_text() == "done\n"
    write_exit_reason(None, "nowhere")
    outcome.unlink()
    outcome.mkdir()
    (tmp_path / "run" / LOCK).unlink()
    write_exit_reason(str(tmp_path / "run"), "why")
    assert "outcome could not be written (Is a directory): why" in capsys.readouterr().out


def test_a_mistake_that_ends_the_ranks_is_left_for_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_eve import pretrain
    from megatron_eve.config import CheckpointConfig, RunConfig
    from megatron_eve.runtime.signals import ExitSignals

    config = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))

    def fail(error: Exception) -> None:
        def train(*_: object) -> None:
            raise error

        monkeypatch.setattr(pretrain, "_train", train)
        with pytest.raises(type(error)):
            pretrain._train_and_record_user_error(config, ExitSignals())

    fail(RuntimeError("a node is lost"))
    assert not (tmp_path / "outcome").exists()  # so the job is requeued
    fail(UserError("row 3 is longer than a pack"))
    assert (tmp_path / "outcome").read_text() == "row 3 is longer than a pack\n"
    (tmp_path / "outcome").unlink()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--save", str(tmp_path), "--seed", "-1"])
    with pytest.raises(SystemExit) as raised:
        pretrain._main(ExitSignals())
    assert raised.value.code == 2
    assert "--seed -1" in (tmp_path / "outcome").read_text()


def test_a_folder_in_use_is_found_before_torch_is_loaded(tmp_path: Path) -> None:
    from megatron_eve.config import CheckpointConfig, RunConfig
    from megatron_eve.preflight import CHECKS

    config = RunConfig(checkpoint=CheckpointConfig(save=str(tmp_path)))
    assert list(CHECKS["folder of another run"](config)) == []
    _write(tmp_path, system="another")
    (message,) = CHECKS["folder of another run"](config)
    assert f"--save {tmp_path}: in use by PID " in message


@pytest.mark.distributed
@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    from tests.runtime.test_signals import started

    losses = tmp_path / "losses.jsonl"
    with started(tmp_path, "--log-interval", "1000000") as first:  # nobody reads what it prints
        _wait_minutes(lambda: losses.exists() and losses.read_text().count("\n") > 2)
        with started(tmp_path) as second:
            _, message = second.communicate(timeout=240)
        assert second.returncode != 0
        assert f"--save {tmp_path}: in use by PID " in message
        before = losses.read_text().count("\n")
        _wait_minutes(lambda: losses.read_text().count("\n") > before + 2)
        assert first.poll() is None


def _wait_minutes(done: Any) -> None:
    deadline = time.monotonic() + 240
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
