"""Two runs that write one dataset: the second is refused while the first lives, and removes what a killed one left."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format import file_lock
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.format.write_lock import WriteLock
from tests.data.helpers import MINI_SETTINGS, write_dataset

ROOT = Path(__file__).parents[3]
# Writes pixels until it is killed.
WRITE = """
import sys, time
from dataclasses import replace
from megatron_eve.data.format.indexed_writer import DatasetWriter
from tests.data.helpers import MINI_SETTINGS
writer = DatasetWriter(sys.argv[1], replace(MINI_SETTINGS, image_storage="pixels"), {"teacher_patch_size": 14})
print("writing", flush=True)
time.sleep(60)
"""


def test_a_run_that_lives_keeps_others_away_and_one_that_was_killed_does_not(tmp_path: Path) -> None:
    prefix = tmp_path / "set"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7"}
    command = [sys.executable, "-c", WRITE, str(prefix)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        left = {path.name for path in tmp_path.iterdir()}
        told = (
            rf"set is being written by PID {other.pid} on \S+ \(Slurm job 7\) since 20.*: wait until it has"
        )
        with pytest.raises(DataError, match=told):
            write_dataset(prefix, 1, 0)
        assert {path.name for path in tmp_path.iterdir()} == left >= {"set_pixels.bin.partial"}
        with pytest.raises(DataError, match=told):
            merge_datasets(str(prefix), [write_dataset(tmp_path / "other", 1, 0)])
        other.kill()
    write_dataset(prefix, 3, 0)
    assert len(IndexedVisionDataset(str(prefix))) == 3
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_is_done_does_not_touch_the_next_one(tmp_path: Path) -> None:
    """Its context ends after it let go of the prefix, which another run may have by then."""
    prefix = tmp_path / "set"
    with DatasetWriter(prefix, MINI_SETTINGS) as first:
        first.add_sample([1, 5, 6], [-100, 5, 6], [])
        first.finalise()
        second = DatasetWriter(prefix, MINI_SETTINGS)
    second.add_sample([1, 7, 8], [-100, 7, 8], [])
    second.finalise()
    assert IndexedVisionDataset(str(prefix)).text(0)[0].tolist() == [1, 7, 8]


def test_the_other_run_ends_while_its_lock_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was opened is no longer the one of that name: its lock would keep nobody away."""
    prefix, real = str(tmp_path / "set"), fcntl.flock

    def ends_before(file: int, how: int) -> None:
        monkeypatch.setattr(file_lock.fcntl, "flock", real)
        (tmp_path / "set_dataset.json.partial").unlink()
        real(file, how)

    monkeypatch.setattr(file_lock.fcntl, "flock", ends_before)
    with WriteLock(prefix), pytest.raises(DataError, match=r"set is being written by PID"):
        WriteLock(prefix)


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    assert len(IndexedVisionDataset(write_dataset(tmp_path / "set", 2, 0))) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "set_dataset.json.partial cannot be locked (No locks available): let no other run write" in told
