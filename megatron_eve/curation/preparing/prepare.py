"""A published download -> parquet shards of records with the pictures in them. `tools/prepare_data.py` is the command.

Shard k holds what is kept of rows k x `rows_per_shard` to (k + 1) x `rows_per_shard` of the download, so neither the
number of workers nor a kill changes what is in it. The parent finds where rows begin; a worker parses the rows of one
shard, reads their pictures and writes the shard. A shard has its name once it is complete, and its counts beside it;
`prepared.json` comes last.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from tqdm import tqdm

from megatron_eve.curation.preparing.config import PrepareConfig
from megatron_eve.curation.preparing.output import PreparedData, PrepareFolder
from megatron_eve.curation.preparing.shard import ShardWriter
from megatron_eve.data.errors import DataError
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.worker_processes import WorkerProcesses, reporting


def prepare(config: PrepareConfig, *, progress: bool = True) -> PreparedData:
    """Write the shards that are missing in `config.output`, and its manifest.

    The same command after a kill goes on with the shards that are missing; after the end it changes nothing.

    Args:
        config: see PrepareConfig.
        progress: draw a progress bar on stderr.

    Raises:
        DataError: the download lacks files or cannot be read further, the folder was begun with other settings or is
            being written by another command, no row can be kept, a worker died, or the disk is full.
    """
    files = config.preparer.files()
    settings = config.settings(files)
    source = config.preparer.open(files)
    try:
        with PrepareFolder(config.output, settings) as folder:
            if (finished := folder.finished()) is not None:
                return finished
            bar = tqdm(unit=" rows", desc="prepare", disable=not progress, mininterval=_bar_seconds())
            with bar:
                _make_shards(config, source, folder, bar)
            left_out = [str(file.relative_to(config.preparer.folder)) for file in config.preparer.left_out]
            return folder.finish(left_out, config.preparer.dead_links())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{error.strerror} in {config.output}: make room; the same command goes on with what is missing"
        ) from error


def _bar_seconds() -> float:
    """Between two states of the progress bar: a log file is not for redrawing."""
    return 0.5 if sys.stderr.isatty() else 30.0


def _shards(source: Source, rows_per_shard: int) -> Iterator[tuple[int, list[RawRow]]]:
    """Number and rows of each shard."""
    left = source.rows()
    yield from enumerate(iter(lambda: list(islice(left, rows_per_shard)), []))


def _make_shards(config: PrepareConfig, source: Source, folder: PrepareFolder, bar: tqdm[Any]) -> None:
    """Make the shards that are missing, in this process or in several."""

    def missing() -> Iterator[tuple[int, list[RawRow]]]:
        for shard, rows in _shards(source, config.rows_per_shard):
            if folder.has(shard):
                bar.update(len(rows))
            else:
                yield shard, rows

    if config.workers > 1:
        died = (
            "a worker died, it may have run out of memory: use fewer --workers or a smaller --rows-per-shard; the same "
            "command goes on with the shards that are missing"
        )
        with WorkerProcesses(config.workers, _work, (config, source), died) as workers:
            _share_out(workers, missing(), bar)
        return
    writer = ShardWriter(config, source)
    for shard, rows in missing():
        bar.update(writer.write(shard, rows))


def _share_out(workers: WorkerProcesses, shards: Iterator[tuple[int, list[RawRow]]], bar: tqdm[Any]) -> None:
    """Give each worker a shard as soon as it has none. The next one is cut from the download meanwhile."""
    idle, busy = list(workers.connections), set[Connection]()

    def receive() -> None:
        for connection in wait(busy):
            assert isinstance(connection, Connection)
            bar.update(workers.answer(connection))
            busy.remove(connection)
            idle.append(connection)

    for shard in shards:
        while not idle:
            receive()
        connection = idle.pop()
        try:
            connection.send(shard)
        except ConnectionError:  # it has ended; why, its answer says
            workers.answer(connection)
        busy.add(connection)
    while busy:
        receive()


def _work(connection: Connection, config: PrepareConfig, source: Source) -> None:
    """A worker process: writes the shards that it gets, and answers with their numbers of rows."""
    with reporting(connection):
        inbox: SimpleQueue[tuple[int, list[RawRow]]] = SimpleQueue()
        threading.Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
        writer = ShardWriter(config, source)
        while True:
            connection.send(writer.write(*inbox.get()))


def _take_in(connection: Connection, inbox: SimpleQueue[tuple[int, list[RawRow]]]) -> None:
    """Pass shards on, and end this process in mid-shard when the parent has ended: another one may write them."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)
