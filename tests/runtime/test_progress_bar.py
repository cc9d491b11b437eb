"""Reading weights and checkpoints says how far it has come: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import RunConfig
from megatron_eve.runtime import progress_bar
from megatron_eve.runtime.progress_bar import byte_progress
from tests.families.eve import run_config
from tests.families.suite import loading_from, run, saving_in
from tests.layouts import ONE, TP2_SP
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]


class Screen(io.StringIO):
    """A standard error that keeps what is written, and may be a terminal."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal


def start(config: RunConfig, terminal: bool = True, seconds: float = 0.0) -> str:
    """Runs on each rank: what a start shows on standard error where reads are slow.

    Args:
        config: of a run.
        terminal: standard error is one.
        seconds: that must pass before a bar, or between two lines.
    """
    import contextlib
    import time
    from unittest import mock

    from torch.distributed.checkpoint import FileSystemReader

    from megatron_eve.models.hf_folder import HFFolder
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup

    def slow(real: Any) -> Any:
        def wait(*arguments: Any) -> Any:
            time.sleep(0.004)
            return real(*arguments)

        return wait

    screen = Screen()
    screen.terminal = terminal
    with (
        mock.patch.object(progress_bar, "_SILENT_SECONDS", seconds),
        mock.patch.object(progress_bar, "_LINE_SECONDS", seconds),
        mock.patch.object(FileSystemReader, "_slice_file", slow(FileSystemReader._slice_file)),
        mock.patch.object(HFFolder, "tensor", slow(HFFolder.tensor)),
        contextlib.redirect_stderr(screen),
        model_parallel(config),
    ):
        setup(config).loader.close()
    return screen.getvalue()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_start_shows_how_far_it_has_read(ranks: RankPool, tmp_path: Path) -> None:
    """Weights in Hugging Face layout, then a checkpoint, also under another layout; rank 0 alone, and all of it."""
    config = run_config(TP2_SP.parallel, iterations=4)
    shown, silent = ranks.run(2, start, config, True, 0.05)
    assert "loading hf_mini224: 100%" in shown and re.search(r"loading hf_mini224: +\d\d%", shown)
    assert not silent
    ranks.run(2, run, saving_in(config, tmp_path), 2, True)
    for layout in (TP2_SP, ONE):
        resumed = loading_from(run_config(layout.parallel, iterations=4), tmp_path)
        shown, *others = ranks.run(layout.world_size, start, resumed)
        for what in ("checking iter_0000002", "loading iter_0000002"):
            assert f"{what}: 100%" in shown
        assert not any(others)
    assert ranks.run(1, start, resumed, True, 60.0) == [""]  # quick enough to say nothing
    (log,) = ranks.run(1, start, resumed, False)
    assert "loading iter_0000002: 100% of 0.0 GB\n" in log and "\r" not in log


def test_a_terminal_that_does_not_say_its_size() -> None:
    """As under docker or srun; the bar stands there all the same, whole at the end."""
    program = (
        "import time; from megatron_eve.runtime.progress_bar import byte_progress\n"
        "with byte_progress('loading x', 40) as done:\n"
        "    for _ in range(4): time.sleep(0.3); done(10)"
    )
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        subprocess.run([sys.executable, "-c", program], stderr=theirs, cwd=ROOT, check=True, timeout=60)
        os.close(theirs)
        shown = screen.read(4096).decode()
    assert "loading x: 100%|" in shown and "40.0/40.0" in shown


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, screen = [0.0], Screen()
    screen.terminal = False
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: now[0])
    with byte_progress("loading x", 4 * 10**9) as done:
        for _ in range(80):
            now[0] += 1.0
            done(5 * 10**7)
    assert screen.getvalue() == "loading x: 39% of 4.0 GB\nloading x: 78% of 4.0 GB\n"
