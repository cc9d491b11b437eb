"""Rows -> blocks of samples, in this process or in several.

Workers take chunks of rows in turns. A worker sends what it made of a chunk, but for the bytes of its images; these it
writes to the dataset's file itself, once it is told their place, which only the chunks before can tell. So the process
that cuts rows and puts samples in order moves little, and keeps many workers busy.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

from megatron_eve.data.format.sample_block import ImageBytes, SampleBlock, make_block
from megatron_eve.data.preprocessing.config import PreprocessConfig
from megatron_eve.data.preprocessing.row_encoder import RowEncoder, SkippedRow
from megatron_eve.data.sources.source import CHUNK_ROWS, RawRow, Source
from megatron_eve.data.worker_processes import WorkerProcesses, reporting

_CHUNKS_AHEAD = 3  # chunks in flight for each worker: enough to keep it busy, few enough to bound memory


class EncodedChunk(NamedTuple):
    """What became of some rows.

    Attributes:
        block: the samples, if any; `DatasetWriter.add_block` takes them and says where their images go.
        skipped: the rows that are left out.
        write_images: writes the images of `block` from a byte offset on.
    """

    block: SampleBlock | None
    skipped: list[SkippedRow]
    write_images: Callable[[int], None]


def encode_rows(
    config: PreprocessConfig, source: Source, rows: Iterable[RawRow], image_path: str
) -> Iterator[EncodedChunk]:
    """Encode rows, in order. Reads only so far ahead as keeps the workers busy.

    When the iterator has ended, all images are in the file.

    Args:
        config: of the dataset; with `workers`.
        source: of the rows.
        rows: what `source.rows()` gives.
        image_path: the file that images are written to, see `DatasetWriter`.

    Raises:
        DataError: a worker died, or found what makes the dataset impossible.
        OSError: images cannot be written.
    """
    left = iter(rows)
    chunks = iter(lambda: list(islice(left, CHUNK_ROWS)), [])
    if config.workers > 1:
        with _Workers(config, source, image_path) as workers:
            yield from workers.encode(chunks)
        return
    encoder, file = RowEncoder(config, source), ImageBytes(image_path)
    try:
        for chunk in chunks:
            block, images, skipped = _encode(encoder, chunk)
            yield EncodedChunk(block, skipped, partial(file.write, images))
    finally:
        file.close()


def _encode(
    encoder: RowEncoder, rows: list[RawRow]
) -> tuple[SampleBlock | None, list[bytes], list[SkippedRow]]:
    """Samples without their images, the images, and rows that are left out."""
    results = encoder.encode_chunk(rows)
    samples = [result for result in results if not isinstance(result, SkippedRow)]
    skipped = [result for result in results if isinstance(result, SkippedRow)]
    block = make_block(samples, encoder.settings) if samples else None
    return block, [image.data for sample in samples for image in sample.images], skipped


class _Workers(WorkerProcesses):
    """Processes that encode rows; chunk i goes to process i % n."""

    def __init__(self, config: PreprocessConfig, source: Source, image_path: str) -> None:
        died = (
            f"a worker died while reading {' '.join(config.inputs)}, it may have run out of memory: "
            "use fewer --workers or a smaller --max-image-pixels"
        )
        super().__init__(config.workers, _work, (config, source, image_path), died)

    def encode(self, chunks: Iterable[list[RawRow]]) -> Iterator[EncodedChunk]:
        """See `encode_rows`."""
        workers = self.connections
        sent = received = 0
        for chunk in chunks:
            self._send(workers[sent % len(workers)], chunk)
            sent += 1
            if sent - received >= _CHUNKS_AHEAD * len(workers):
                yield self._receive(workers[received % len(workers)])
                received += 1
        while received < sent:
            yield self._receive(workers[received % len(workers)])
            received += 1
        for worker in workers:
            self._send(worker, None)
        for worker in workers:
            self.answer(worker)

    def _receive(self, worker: Connection) -> EncodedChunk:
        block, skipped = self.answer(worker)
        return EncodedChunk(block, skipped, partial(self._send, worker))

    def _send(self, worker: Connection, message: object) -> None:
        try:
            worker.send(message)
        except ConnectionError:  # it has ended; why, it says behind its last results
            while True:
                self.answer(worker)


def _work(connection: Connection, config: PreprocessConfig, source: Source, image_path: str) -> None:
    """A worker process: answers rows with (block, skipped), writes images at an offset, and ends at None."""
    with reporting(connection):
        inbox: SimpleQueue[list[RawRow] | int | None] = SimpleQueue()
        threading.Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
        encoder, file = RowEncoder(config, source), ImageBytes(image_path)
        held: deque[list[bytes]] = deque()  # images of chunks whose place is not known yet
        while (message := inbox.get()) is not None:
            if isinstance(message, int):
                file.write(held.popleft(), message)
                continue
            block, images, skipped = _encode(encoder, message)
            if block is not None:
                held.append(images)
            connection.send((block, skipped))
        connection.send(None)


def _take_in(connection: Connection, inbox: SimpleQueue[list[RawRow] | int | None]) -> None:
    """Empty the connection at once, so that the parent never waits in sending while a worker waits for the parent."""
    try:
        while True:
            inbox.put(message := connection.recv())
            if message is None:
                return
    except (EOFError, OSError):  # the parent has ended, or wants no more
        os._exit(1)
