"""The codes of a dataset, by the processes of one command. `tools/tokenize_images.py` is the command.

All that can be wrong is looked for before torch is loaded. Several commands, on one node or many, may work on the same
codes (`data/format/code_writer.py`); the one that makes the last chunk puts them in place.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait

from tqdm import tqdm

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import MOST_CODES, CodeInfo, CodeSettings, dataset_digest
from megatron_eve.data.format.code_writer import CodeWork
from megatron_eve.data.format.drawn import drawn_counts
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.images.squares import AUTO, FITS
from megatron_eve.data.tokenizing.config import TokenizeConfig
from megatron_eve.data.worker_processes import WorkerProcesses, reporting
from megatron_eve.models.registry import find_image_codes
from megatron_eve.runtime.phases import phase
from megatron_eve.runtime.ranks import global_rank

_MOST_WORKERS = 8  # by default, on CPUs: each has a copy of the tower


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        info: the manifest; None if other commands still make some of the codes.
        images: made by this command; 0 where the codes were there already.
        seconds: that it took, without loading the tower.
        left: images that other commands still make.
        finished: this command put the codes in place.
    """

    info: CodeInfo | None
    images: int = 0
    seconds: float = 0.0
    left: int = 0
    finished: bool = False


def code_settings(config: TokenizeConfig) -> CodeSettings:
    """Open the dataset and fingerprint the tower: what the codes are made of and with.

    Raises:
        DataError: the dataset does not open or has no images, or the codes do not fit into 16 bits.
    """
    dataset, tower = open_dataset(config.input), config.tower
    if not dataset.info.num_images:
        raise DataError(f"{config.input} has no images: there is nothing to make codes of")
    if tower.codebook_size > MOST_CODES:
        raise DataError(
            f"the tower has {tower.codebook_size:,} codes, and codes are stored in 16 bits: use one with at most "
            f"{MOST_CODES:,}"
        )
    with phase("fingerprint of the tower"):
        sha256 = find_image_codes(config.family).sha256(tower)
    return CodeSettings(
        family=config.family,
        tower_sha256=sha256,
        square_size=config.square_size,
        grid=tower.grid,
        depth=tower.depth,
        codebook_size=tower.codebook_size,
        # Where no picture is to be drawn, all have the same fit.
        fit=FITS[0] if config.fit == AUTO and not drawn_counts(dataset.info)[0] else config.fit,
        dtype=config.dtype,
        micro_batch_size=config.micro_batch_size,
        dataset_sha256=dataset_digest(dataset),
        num_images=dataset.info.num_images,
    )


def tokenize(config: TokenizeConfig, *, progress: bool = True) -> Outcome:
    """Make the codes at `config.output_prefix`, together with whatever other commands make them.

    Args:
        config: see TokenizeConfig.
        progress: draw a progress bar on stderr, on rank 0.

    Raises:
        DataError: what is wrong with the dataset, with codes that are there already, or with the disk.
    """
    settings = code_settings(config)
    try:
        with CodeWork(config.output_prefix, settings, overwrite=config.overwrite) as work:
            if work.finished is not None:
                return Outcome(work.finished)
            config = _with_workers(config, work.num_chunks)
            with _ProgressBar(settings.num_images, work.done_images(), progress) as bar:
                if config.workers == 1:
                    from megatron_eve.data.tokenizing.worker import make_codes

                    make_codes(config, work, bar.add)
                else:
                    _run_workers(config, settings, bar)
            info, here = work.finish()
            left = 0 if info else settings.num_images - work.done_images()
            return Outcome(info, bar.images, bar.seconds, left, here)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{error.strerror} at {config.output_prefix}: make room; the same command goes on"
        ) from error


def _with_workers(config: TokenizeConfig, num_chunks: int) -> TokenizeConfig:
    """The same with the number of processes: by default one with a GPU, else one for each core, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = config.workers
    if not workers:
        import torch

        cores = len(os.sched_getaffinity(0)) // ranks
        workers = 1 if torch.cuda.is_available() else max(min(cores, _MOST_WORKERS), 1)
    workers = min(workers, num_chunks)
    return replace(config, workers=workers, processes=workers * ranks)


def _run_workers(config: TokenizeConfig, settings: CodeSettings, bar: _ProgressBar) -> None:
    """Make chunks in several processes, until no process has one left to begin.

    Raises:
        DataError: a process died.
        Exception: what one of them raised.
    """
    died = (
        "a process of this command died, it may have run out of memory: give fewer --workers or a smaller "
        "--micro-batch-size; what is made is kept"
    )
    with WorkerProcesses(config.workers, _work, (config, settings), died) as workers:
        open_ones = set(workers.connections)
        while open_ones:
            for connection in wait(open_ones):
                assert isinstance(connection, Connection)
                made: int | None = workers.answer(connection)
                if made is None:
                    open_ones.remove(connection)
                else:
                    bar.add(made)


def _work(connection: Connection, config: TokenizeConfig, settings: CodeSettings) -> None:
    """A process: sends the number of images of each batch, and at the end None or what went wrong."""
    with reporting(connection):
        threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
        from megatron_eve.data.tokenizing.worker import make_codes

        with CodeWork(config.output_prefix, settings, overwrite=config.overwrite) as work:
            if work.finished is None:
                make_codes(config, work, connection.send)
        connection.send(None)


def _end_with_parent(connection: Connection) -> None:
    """End this process when its parent has ended or wants no more; it holds no half-written chunk."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


class _ProgressBar:
    """A bar over the images of the dataset, and what this command did since its first process was ready.

    Attributes:
        images: made by this command.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.images = 0
        self._started: float | None = None
        self._ended = 0.0
        interval = 0.2 if sys.stderr.isatty() else 10.0  # a log file is not for redrawing
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=" images",
            desc="tokenize",
            disable=not shown or global_rank() != 0,
            mininterval=interval,
        )

    @property
    def seconds(self) -> float:
        """From the first process that was ready to the last batch."""
        return self._ended - (self._started or self._ended)

    def add(self, images: int) -> None:
        """Count images; 0 says that a process is ready."""
        self._ended = time.monotonic()
        if self._started is None:
            self._started = self._ended
        self.images += images
        self._bar.update(images)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
