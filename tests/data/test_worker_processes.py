"""Processes that share the work of a command: the end of one ends the others without a word."""

from __future__ import annotations

from multiprocessing.connection import Connection

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.worker_processes import WorkerProcesses, reporting


def fail_when_told(connection: Connection) -> None:
    with reporting(connection):
        connection.recv()
        raise DataError("the weights are damaged")


def test_the_error_of_one_process_is_the_only_one(capfd: pytest.CaptureFixture[str]) -> None:
    """The other is at work when the pipe is closed, so it fails, too, and nobody reads what it says."""
    with (
        pytest.raises(DataError, match=r"^the weights are damaged"),
        WorkerProcesses(2, fail_when_told, (), "a process died") as processes,
    ):
        processes.connections[0].send("go")
        processes.answer(processes.connections[0])
    assert capfd.readouterr().err == ""
