"""One process that makes codes: images of a dataset, decoded ahead by threads, through the tower, chunk by chunk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import CodeSettings
from megatron_eve.data.format.code_writer import Chunk, CodeWork
from megatron_eve.data.format.joined import AnyDataset, open_dataset
from megatron_eve.data.images.decode import ImageError
from megatron_eve.data.images.squares import AUTO, placeholder_square, square_of
from megatron_eve.data.inspecting.checking import parts_of
from megatron_eve.data.inspecting.pictures import read_picture, stored_bytes
from megatron_eve.data.tokenizing.config import TokenizeConfig
from megatron_eve.models.image_codes import CodeModel
from megatron_eve.models.registry import find_image_codes
from megatron_eve.runtime.accelerator import accelerator

_BATCHES_AHEAD = 3  # that are decoded while the tower works on one


class _Batch(NamedTuple):
    """A micro-batch of a chunk, of which the pictures are being decoded.

    Attributes:
        chunk: it belongs to.
        pictures: of each image, its square uint8 [S, S, 3], and why it is the placeholder image, if it is.
        last: the chunk has no other batch behind it.
    """

    chunk: Chunk
    pictures: list[Future[tuple[NDArray[np.uint8], str | None]]]
    last: bool


def make_codes(config: TokenizeConfig, work: CodeWork, done: Callable[[int], object]) -> None:
    """Make chunks until there is none left that no other process makes.

    Args:
        config: of the command.
        work: that this process has joined.
        done: called with 0 when the tower is ready, and after each batch with the number of its images.

    Raises:
        UserError: weights or a dataset that cannot be read; too little memory.
    """
    dataset = open_dataset(config.input)
    for part in parts_of(dataset):
        if part.info.num_images:
            with suppress(DataError):
                stored_bytes(part, 0)  # opens the file before the threads do
    device = code_device()
    if device.type == "cpu":
        # Sums of one thread do not depend on how many there are: the same codes whatever --workers is.
        torch.set_num_threads(1)
    codes = find_image_codes(config.family)
    model = codes.load_tower(config.tower, device, getattr(torch, config.dtype))
    done(0)
    placeholder = placeholder_square(codes.pad_colour, config.square_size)
    threads = max(len(os.sched_getaffinity(0)) // config.processes, 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def decode(image: int) -> tuple[NDArray[np.uint8], str | None]:
            return _square(dataset, image, work.settings, placeholder)

        made: list[NDArray[np.int64]] = []
        damaged: list[str] = []
        for batch in _batches(work, config.micro_batch_size, pool, decode):
            squares, reasons = zip(*(picture.result() for picture in batch.pictures), strict=True)
            damaged += [reason for reason in reasons if reason is not None]
            made.append(encode_squares(model, squares, config.micro_batch_size, device))
            done(len(squares))
            if batch.last:
                work.write(batch.chunk, np.concatenate(made), damaged)
                made, damaged = [], []


def code_device() -> torch.device:
    """The device of this rank, on which float32 is float32: by default cuDNN's convolutions round to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    return accelerator().device


def _batches(
    work: CodeWork,
    size: int,
    pool: ThreadPoolExecutor,
    decode: Callable[[int], tuple[NDArray[np.uint8], str | None]],
) -> Iterator[_Batch]:
    """Batches of the chunks of this process, some of which are decoded ahead."""
    ahead: deque[_Batch] = deque()
    for chunk in work.chunks():
        for first in range(chunk.first, chunk.stop, size):
            stop = min(first + size, chunk.stop)
            pictures = [pool.submit(decode, image) for image in range(first, stop)]
            ahead.append(_Batch(chunk, pictures, stop == chunk.stop))
            if len(ahead) > _BATCHES_AHEAD:
                yield ahead.popleft()
    yield from ahead


def _square(
    dataset: AnyDataset, image: int, settings: CodeSettings, placeholder: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], str | None]:
    """An image as the tower reads it, uint8 [S, S, 3], and why it is the placeholder, if it is."""
    try:
        picture = read_picture(dataset, image)
    except ImageError as error:
        return placeholder, f"{dataset.image_name(image)}: {error}"
    fit = settings.fit
    if fit == AUTO:
        fit = "square" if dataset.drawn(image) else "stretch"
    return square_of(picture, fit, settings.square_size), None


def encode_squares(
    model: CodeModel, squares: Sequence[NDArray[np.uint8]], size: int, device: torch.device
) -> NDArray[np.int64]:
    """Codes int64 [images, h, w, D].

    A batch that is not full is filled up, so that all have one shape, and sums the same order.

    Args:
        model: the tower.
        squares: one or more, uint8 [S, S, 3] each.
        size: pictures of a batch, at least as many.
        device: of the tower.

    Raises:
        DataError: the memory of the GPU is too small.
    """
    pixels = np.stack([*squares, *[squares[-1]] * (size - len(squares))])
    try:
        with torch.inference_mode():
            codes = model.encode(torch.from_numpy(pixels).to(device))
        found: NDArray[np.int64] = codes[: len(squares)].cpu().numpy()
    except torch.cuda.OutOfMemoryError as error:
        raise DataError(
            f"the memory of the GPU is too small for --micro-batch-size {size}: give a smaller one"
        ) from error
    return found
