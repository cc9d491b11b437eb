"""Leases: a checkpoint that is read outlives --keep-last, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_eve.checkpoint import lease
from megatron_eve.checkpoint.files import weights_fingerprint
from megatron_eve.checkpoint.lease import EXPIRY_SECONDS, checkpoint_lease, is_leased
from megatron_eve.checkpoint.store import CheckpointStore


def run_of(folder: Path, iterations: int) -> CheckpointStore:
    """A run's folder with checkpoints 1 to N of one file of weights."""
    store = CheckpointStore(folder)
    for iteration in range(1, iterations + 1):
        store.folder(iteration).mkdir(parents=True)
        (store.folder(iteration) / "__0_0.distcp").write_bytes(b"weights")
    store._write_tracker(iterations)
    return store


def test_a_checkpoint_that_is_read_outlives_keep_last_and_no_longer(tmp_path: Path) -> None:
    store = run_of(tmp_path, 3)
    before = weights_fingerprint(store.folder(1))
    with checkpoint_lease(store.folder(1)):
        assert [path.name[:6] for path in store.folder(1).glob("*.json")] == ["lease-"]
        assert weights_fingerprint(store.folder(1)) == before
        assert store.prune(1, None, False) == []
        assert store.iterations() == [1, 3]
    assert [path.name for path in store.folder(1).iterdir()] == ["__0_0.distcp"]
    assert store.prune(1, None, False) == []
    assert store.iterations() == [3]


def test_one_that_is_read_keeps_its_optimizer_state_until_later(tmp_path: Path) -> None:
    store = run_of(tmp_path, 3)
    state = store.folder(2) / "optimizer__0_1.distcp"
    state.write_bytes(b"state")
    with checkpoint_lease(store.folder(2)):
        assert store.prune(1, 2, True) == [] and state.exists()


def test_a_lease_of_a_process_that_was_killed_expires(tmp_path: Path) -> None:
    store = run_of(tmp_path, 2)
    code = (
        "import os, signal, pathlib\nfrom megatron_eve.checkpoint.lease import checkpoint_lease\n"
        f"with checkpoint_lease(pathlib.Path({str(store.folder(1))!r})):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (left,) = store.folder(1).glob("lease-*.json")
    store.prune(1, None, False)
    assert store.iterations() == [1, 2]
    there = left.stat().st_mtime
    os.utime(left, (there, there - EXPIRY_SECONDS + 20))
    assert is_leased(store.folder(1))
    os.utime(left, (there, there - EXPIRY_SECONDS - 1))
    assert not is_leased(store.folder(1))
    store.prune(1, None, False)
    assert store.iterations() == [2]


def test_the_age_of_a_lease_does_not_depend_on_the_local_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run_of(tmp_path, 1)
    real = time.time
    with checkpoint_lease(store.folder(1)):
        for hours in (-3, 3):
            monkeypatch.setattr(time, "time", lambda hours=hours: real() + 3600 * hours)
            assert is_leased(store.folder(1))
        assert len(list(store.folder(1).iterdir())) == 2  # the file that tells the time is gone


def test_a_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.02)
    store = run_of(tmp_path, 1)
    with checkpoint_lease(store.folder(1)):
        (path,) = store.folder(1).glob("lease-*.json")
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while not is_leased(store.folder(1)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_lease_that_is_taken_while_the_folder_goes_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run_of(tmp_path, 2)
    rename = Path.rename

    def taken_first(self: Path, target: Path) -> Path:
        if target.suffix == ".removed":
            (self / "lease-other-1.json").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", taken_first)
    assert store.prune(1, None, False) == []
    assert (store.folder(1) / "__0_0.distcp").exists()


def test_a_folder_that_cannot_be_written_gets_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    folder = run_of(tmp_path, 1).folder(1)
    monkeypatch.setattr(Path, "write_text", refuse)  # root may write everywhere
    with checkpoint_lease(folder):
        assert [path.name for path in folder.iterdir()] == ["__0_0.distcp"]
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1 and f"{folder} gets no lease (Read-only file system)" in printed
