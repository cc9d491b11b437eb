"""A conversion that is killed leaves nothing that looks whole, and the same command brings it to its end."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_eve.config import TRACKER
from tests.convert.test_conversion import ROOT, convert, llama
from tests.golden_dir import find_golden

# Times that each direction is killed, beside the time that says how long it takes.
KILLS = 4


class Killed(BaseException):
    """In place of SIGKILL: nothing is cleaned up after it."""


def no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process does not do any more."""
    from megatron_eve.checkpoint.store import CheckpointStore

    monkeypatch.setattr(CheckpointStore, "abandon", lambda self, partial: None)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)


def die_at(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """Die in place of the given call of a method."""
    real, calls = getattr(owner, name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def moments() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    """Where an import may die."""
    from megatron_eve.checkpoint.hf.folder import LazyTensor
    from megatron_eve.checkpoint.store import CheckpointStore

    return {
        "first tensor": lambda patch: die_at(patch, LazyTensor, "tensor", 1),
        "last tensor": lambda patch: die_at(patch, LazyTensor, "tensor", 74),
        "before its checksums": lambda patch: die_at(patch, CheckpointStore, "free_reserve", 1),
        "before its name": lambda patch: die_at(patch, CheckpointStore, "publish", 1),
        "between its two names": lambda patch: die_at(patch, CheckpointStore, "_write_tracker", 1),
    }


@pytest.mark.parametrize(
    "moment",
    ["first tensor", "last tensor", "before its checksums", "before its name", "between its two names"],
)
def test_an_import_that_dies_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    published, start = find_golden("_shared/hf_mini224"), tmp_path / "start"
    with monkeypatch.context() as patch:
        no_cleaning(patch)
        moments()[moment](patch)
        with pytest.raises(Killed):
            convert("import", "--source", published, "--target", start)
    assert list(start.iterdir()) and not (start / TRACKER).exists()
    # A folder has its name when it is whole, and a whole one is read without its tracker.
    named = moment == "between its two names"
    assert convert("export", "--source", start, "--target", tmp_path / "early") == (0 if named else 2)
    assert convert("import", "--source", published, "--target", start) == 0
    assert sorted(path.name for path in start.iterdir()) == ["iter_0000000", TRACKER]
    assert convert("export", "--source", start, "--target", tmp_path / "back") == 0


@pytest.mark.parametrize("call", [1, 106])
def test_an_export_that_dies_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    from megatron_eve.checkpoint.hf.folder import LazyTensor

    published, start, back = find_golden("_shared/hf_mini224"), tmp_path / "start", tmp_path / "back"
    assert convert("import", "--source", published, "--target", start) == 0
    with monkeypatch.context() as patch:
        no_cleaning(patch)
        die_at(patch, LazyTensor, "tensor", call)
        with pytest.raises(Killed):
            convert("export", "--source", start, "--target", back)
    assert not back.exists() and list(tmp_path.glob("back.partial.*"))
    assert convert("export", "--source", start, "--target", back) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "start"]


def begin(*words: object) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(process: subprocess.Popen[bytes], folder: Path, pattern: str, known: set[Path]) -> None:
    """Until it has made something of that name, or has ended."""
    while process.poll() is None and not set(folder.glob(pattern)) - known:
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["import", "export"])
def test_killed_at_random(tmp_path: Path, direction: str) -> None:
    """SIGKILL at random moments of writing 180 MB: no folder looks whole that is not, and the next time ends well."""
    source = llama(tmp_path / "llama", hidden_size=768, intermediate_size=2048, vocab_size=8000)
    whole = tmp_path / "whole"
    if direction == "export":
        assert convert("import", "--source", source, "--target", tmp_path / "start") == 0
        source = tmp_path / "start"
    parent = tmp_path / "out"
    parent.mkdir()
    started, named = {"export": ("*.partial.*", "target"), "import": ("*/*.partial.*", f"*/{TRACKER}")}[
        direction
    ]
    process = begin(direction, "--source", source, "--target", parent / "target")
    wait_for(process, parent, started, set())
    first = time.monotonic()
    wait_for(process, parent, named, set())
    writing = time.monotonic() - first
    assert process.wait() == 0
    (parent / "target").rename(whole)
    seed = int(time.time())
    moments, unfinished = random.Random(seed), 0
    for _ in range(KILLS):
        known = set(parent.glob(started))
        process = begin(direction, "--source", source, "--target", parent / "target")
        wait_for(process, parent, started, known)
        time.sleep(moments.uniform(0, writing))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = looks_whole(parent / "target", direction)
        unfinished += not found
        if found:
            check_equal(parent / "target", whole)
            shutil.rmtree(parent / "target")
    assert unfinished, f"seed {seed}: no kill came in time"
    assert convert(direction, "--source", source, "--target", parent / "target") == 0
    check_equal(parent / "target", whole)


def looks_whole(target: Path, direction: str) -> bool:
    """Does it look whole to those that read it?"""
    if direction == "export":
        return target.exists()
    from megatron_eve.checkpoint.compatibility import CheckpointError
    from megatron_eve.convert.exporting import open_checkpoint

    try:
        open_checkpoint(target)
    except CheckpointError as error:
        assert "no checkpoint there" in str(error)
        return False
    return True


def check_equal(target: Path, whole: Path) -> None:
    """All files of weights and settings with the same bytes."""
    names = sorted(
        path.relative_to(whole)
        for path in whole.rglob("*")
        if path.suffix in (".distcp", ".safetensors", ".json")
    )
    assert names
    for name in names:
        assert (target / name).read_bytes() == (whole / name).read_bytes(), name
