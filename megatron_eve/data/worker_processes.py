"""Processes that share the work of a command, each at the other end of a pipe. They end with the command."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from megatron_eve.data.errors import DataError

_END_SECONDS = 10.0  # that a process has to end in


class WorkerProcesses:
    """Spawned processes, until the end of the `with` block.

    Args:
        count: of processes.
        target: what each runs, with its end of the pipe and `arguments`; under `reporting`.
        arguments: pickled.
        died: message about a process that ended without a word, with the remedy.

    Attributes:
        connections: this process's ends of the pipes.
    """

    def __init__(
        self, count: int, target: Callable[..., None], arguments: tuple[Any, ...], died: str
    ) -> None:
        self.connections: list[Connection] = []
        self._died = died
        self._processes = []
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self._processes.append(process)

    def answer(self, connection: Connection) -> Any:
        """The next message of a process.

        Raises:
            DataError: it died.
            Exception: what it raised.
        """
        try:
            message = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise DataError(self._died) from error
        if isinstance(message, Exception):
            raise message
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self.connections:
            connection.close()  # which ends a process that still has work
        for process in self._processes:
            process.join(_END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def reporting(connection: Connection) -> Iterator[None]:
    """In such a process, around its work: what goes wrong is sent to the parent, with the traceback as a note."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent sees to the end
    try:
        yield
    except Exception as error:
        error.add_note(traceback.format_exc())
        # The parent has closed the pipe where the error of another process ended the command.
        with suppress(ConnectionError):
            connection.send(error)
