"""Steps to microbatches: which samples a step holds, how they are packed, and the batches of this rank.

The state of the loader is one number, the samples consumed so far. Everything else follows from it, the order and
the manifest: the samples of the step, their packs, what each data-parallel rank runs, and the totals that the
loss is divided by, all before an image is read.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.batch import PackedBatch, build_batch, padded_lengths, padding_multiples
from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.errors import AGAIN, DataError
from megatron_eve.data.images.interface import ImageDecoder
from megatron_eve.data.sampling.orders import Order
from megatron_eve.data.sampling.packing import assign_packs, pack_step
from megatron_eve.models.model_parts import ImageShare

_MOST_REPORTED = 20  # damaged images that a rank reports one by one; all are counted at the end of the run
# Packs of one length are rounded up to a multiple of this, so that there are few different lengths and the allocator
# can reuse memory.
_LENGTH_STEP = 256
AHEAD = 2  # microbatches that are built while one runs


class WaitTime:
    """Adds up the seconds for which the training thread waits for data.

    Attributes:
        seconds: since the loader was made: planning steps, and waiting for batches that are not built yet.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add the duration of this block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class LazyBatches(Sequence[PackedBatch]):
    """The microbatches of one step on one rank, each built when it is asked for or a little before.

    It can be iterated any number of times, also in turns, as the chunks of an interleaved schedule do: a batch
    is built once and kept until the step is dropped. An error in building one is raised where it is asked for.
    """

    def __init__(
        self,
        builders: Sequence[Callable[[], PackedBatch]],
        executor: ThreadPoolExecutor,
        near_end: Callable[[], None],
        wait: WaitTime,
    ) -> None:
        """``near_end`` is called when the last batch is asked for, to prepare what comes after this step.

        ``wait`` takes the time until a batch that is asked for is there.
        """
        self._builders = builders
        self._wait = wait
        self._executor = executor
        self._near_end = near_end
        self._futures: list[Future[PackedBatch]] = []

    def __len__(self) -> int:
        return len(self._builders)

    @overload
    def __getitem__(self, index: int) -> PackedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[PackedBatch]: ...
    def __getitem__(self, index: int | slice) -> PackedBatch | list[PackedBatch]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # raises IndexError; understands negative numbers
        with self._wait.measured():
            self.start(number + 1 + AHEAD)
            if number == len(self) - 1:
                self._near_end()
            return self._futures[number].result()

    def start(self, count: int) -> None:
        """Starts building the first ``count`` batches, if they exist and are not started."""
        for builder in self._builders[len(self._futures) : count]:
            self._futures.append(self._executor.submit(builder))


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step. The totals are those of the whole step, over all data-parallel ranks."""

    batches: Sequence[PackedBatch]
    """The microbatches of this rank, built lazily; may be iterated more than once."""
    num_microbatches: int
    """Microbatches of this rank, the same number on every rank."""
    num_packs: int
    """Microbatches of all data-parallel ranks that hold a sample; the others are empty and only make up the number."""
    num_labels: int
    """Rows with a label."""
    num_images: int
    """Images."""
    num_tokens: int
    """Tokens of the samples with images expanded, without any padding."""
    capacity_fraction: float
    """How full the packs are: tokens / (packs * seq_length)."""
    sample_ids: NDArray[np.int64]
    """[n] dataset indices of the step, in their order."""
    pack_length: int | None = None
    """Tokens of each pack with its padding, the same for all packs of all ranks; None if they differ."""
    num_visual_labels: int = 0
    """Rows of images that are to be drawn, each with codes to predict."""
    code_depth: int = 0
    """Codes of such a row; 0 where images have none."""

    @property
    def counts(self) -> dict[str, float]:
        """What losses.jsonl says of the samples."""
        return {
            "tokens": self.num_tokens,
            "labels": self.num_labels,
            "images": self.num_images,
            # Those that are predicted.
            **({"codes": self.num_visual_labels * self.code_depth} if self.code_depth else {}),
            "pack_fill": self.capacity_fraction,
        }


def _checked_multiples(
    seq_length: int, tensor_parallel: int, context_parallel: int, row_multiple: int
) -> tuple[int, int]:
    """`padding_multiples`, of which a pack's length has to be one.

    Raises:
        ValueError: it is none.
    """
    multiples = padding_multiples(tensor_parallel, context_parallel, row_multiple)
    if seq_length < 1 or seq_length % multiples[1]:
        raise ValueError(
            f"--seq-length is {seq_length}; with tensor parallel {tensor_parallel}, context parallel "
            f"{context_parallel} and rows in multiples of {row_multiple} it must be a multiple of {multiples[1]}, so "
            "that a padded pack still fits"
        )
    return multiples


class StepLoader:
    """Gives the microbatches of any step of a run."""

    def __init__(
        self,
        dataset: VisionDataset,
        order: Order,
        *,
        global_batch_size: int,
        seq_length: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        pack_multiple: int = 1,
        tensor_parallel: int = 1,
        context_parallel: int = 1,
        row_multiple: int = 1,
        fixed_length: Literal["step", "seq_length"] | None = None,
        max_images: int | None = None,
        image_work: float = 0.0,
        visual_label_work: float = 0.0,
        views: Collection[str],
        shared_views: Collection[str] = (),
        share: ImageShare | None = None,
        decoder: ImageDecoder | None = None,
        upload: Callable[[torch.Tensor], torch.Tensor] | None = None,
        codes: bool = False,
    ) -> None:
        """
        Args:
            dataset: where the samples lie.
            order: which of them stands at which position of the run.
            global_batch_size: samples of a full step, over all ranks.
            seq_length: tokens that a pack may hold.
            data_parallel_rank, data_parallel_size: whose microbatches these are.
            pack_multiple: microbatches of a rank come in multiples of this (the pipeline-parallel size under an
                interleaved schedule, else 1).
            tensor_parallel, context_parallel, row_multiple: set the padding (see `padding_multiples`).
            fixed_length: pad the packs of a step, on all ranks, to one length: that which the longest of them needs
                ("step"), or ``seq_length``. They are balanced, so the first is little, where the second may be nearly
                half of a step whose packs had to be a multiple of the data-parallel size. None leaves them.
            max_images: images that a pack may hold, tile by tile; None does not bound it.
            image_work: cost of an image, or of a tile of one, in the front end, for packs of equal work
                (`ModelFamily.image_work`).
            visual_label_work: likewise of a position of an image that is to be drawn, in the objectives
                (`ModelFamily.visual_label_work`).
            views: of all images that this rank decodes.
            shared_views: of its share of each pack's images that this rank decodes.
            share: which images those are; without one there are no shared views.
            decoder: decodes the images; closed with the loader. By default the plain reference.
            upload: takes a batch's pixels to where they are used, while earlier batches run; by default they stay.
            codes: this rank reads the codes of each pack's images.

        Raises:
            ValueError: an empty dataset, or sizes that do not go together.
        """
        if not len(dataset):
            raise ValueError("the dataset holds no sample: see the summary that preprocessing printed")
        if global_batch_size < 1:
            raise ValueError(f"--global-batch-size is {global_batch_size}; it must be at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data-parallel rank {data_parallel_rank} is not below the size {data_parallel_size}"
            )
        self._multiples = _checked_multiples(seq_length, tensor_parallel, context_parallel, row_multiple)
        self._dataset, self._order = dataset, order
        self._global_batch_size = global_batch_size
        self._seq_length = seq_length
        self._rank = data_parallel_rank
        self._ranks = data_parallel_size
        self._pack_multiple = pack_multiple
        self._context_parallel = context_parallel
        self._fixed_length = fixed_length
        self._max_images, self._image_work = max_images, image_work
        self._visual_label_work = visual_label_work
        self.wait = WaitTime()
        self.damaged: dict[int, str] = {}
        """Images that this rank could not decode so far, with their names and why."""
        self._build = partial(
            build_batch,
            dataset,
            tensor_parallel=tensor_parallel,
            context_parallel=context_parallel,
            row_multiple=row_multiple,
            views=views,
            shared_views=shared_views,
            share=share,
            decoder=decoder,
            codes=codes,
        )
        self._decoder = decoder
        self._upload = upload
        self._reads_images = bool(views) or (share is not None and bool(shared_views))
        # One thread: Pillow and file reads release the interpreter lock, and batches stay in order. The queue is
        # at most AHEAD + 1 batches deep, which is what an exiting process may have to wait for.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
        self._expected: tuple[tuple[int, int], Step] | None = None

    def step(self, consumed_samples: int, num_samples: int | None = None) -> Step:
        """The step that takes ``num_samples`` samples after the first ``consumed_samples`` of the run.

        Steps may be asked for in any order; asked for one after another, the next one's first batches are built
        while this one's last one runs.

        Args:
            consumed_samples: samples that the run has taken so far.
            num_samples: at most, and by default, ``global_batch_size``; less only for the last step of a run.

        Raises:
            ValueError: a number out of range, or a sample with more images, or tiles of them, than a pack may hold.
            DataError: a sample that is longer than ``seq_length``, or a damaged record.
        """
        count = self._global_batch_size if num_samples is None else num_samples
        if consumed_samples < 0 or not 1 <= count <= self._global_batch_size:
            raise ValueError(
                f"no step takes {count} samples after {consumed_samples} consumed ones: it takes "
                f"1 .. {self._global_batch_size}, after 0 or more"
            )
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == (consumed_samples, count):
            return expected[1]
        with self.wait.measured():
            return self._run_step(consumed_samples, count)

    def step_of(self, sample_ids: NDArray[np.int64]) -> Step:
        """A step of any samples, outside the run: the run's order and its prepared batches do not change.

        Args:
            sample_ids: [n] samples of the dataset, in the step's order.

        Raises:
            DataError: a sample that is longer than ``seq_length``, or a damaged record.
        """
        return self._plan(sample_ids, lambda: None)

    def close(self) -> None:
        """Stops building batches; those that are not started are dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()

    def _run_step(self, consumed: int, count: int) -> Step:
        """The step at a position of the run."""
        ids = self._order(np.arange(consumed, consumed + count, dtype=np.int64))
        return self._plan(ids, partial(self._prepare, consumed + count, count))

    def _plan(self, ids: NDArray[np.int64], near_end: Callable[[], None]) -> Step:
        """Packs a step's samples, assigns packs to ranks and adds up totals; reads no text and no image."""
        lengths = self._dataset.lengths(ids)
        rows = self._dataset.samples[ids]
        wrong = (lengths < 1) | (lengths > self._seq_length) | (rows["num_images"] < 0)
        if wrong.any():
            index = int(ids[wrong][0])
            raise DataError(
                f"{self._dataset.sample_name(index)} has {lengths[wrong][0]} tokens and {rows['num_images'][wrong][0]} "
                f"images by its record, and a pack holds {self._seq_length} tokens: raise --seq-length, or, if it is "
                f"not as long as that, {AGAIN}"
            )
        lengths_in_pack = padded_lengths(lengths, self._context_parallel)
        counted = self._max_images is not None or self._image_work
        images = self._dataset.tile_counts(ids) if counted else None
        visual_labels = self._dataset.visual_labels(ids)
        other_work = visual_labels * self._visual_label_work if self._visual_label_work else None
        packs = pack_step(
            lengths_in_pack,
            self._seq_length,
            self._ranks * self._pack_multiple,
            images,
            self._max_images,
            # Packs that are padded to one length cost the same in the decoder, so that they must be alike in length.
            0.0 if self._fixed_length else self._image_work,
            None if self._fixed_length else other_work,
        )
        assigned = assign_packs(packs, lengths_in_pack, self._ranks, images, self._image_work, other_work)
        mine = assigned[self._rank]
        if self._reads_images:
            self._dataset.will_need(ids[[i for pack in mine for i in pack]])
        num_tokens = int(lengths.sum())
        length = self._common_length(packs, lengths_in_pack)
        return Step(
            batches=LazyBatches(
                [partial(self._built, ids[pack].tolist(), length) for pack in mine],
                self._executor,
                near_end=near_end,
                wait=self.wait,
            ),
            num_microbatches=len(mine),
            num_packs=sum(bool(pack) for pack in packs),
            num_labels=int(rows["labels"].sum()),
            num_images=int(rows["num_images"].sum()),
            num_tokens=num_tokens,
            capacity_fraction=num_tokens / (len(packs) * self._seq_length),
            sample_ids=ids,
            pack_length=length,
            num_visual_labels=int(visual_labels.sum()),
            code_depth=self._dataset.code_depth,
        )

    def _common_length(self, packs: Sequence[Sequence[int]], lengths: NDArray[np.int64]) -> int | None:
        """Length to which all packs of a step are padded: that of the longest, rounded up, or ``seq_length``."""
        if self._fixed_length != "step":
            return self._seq_length if self._fixed_length else None
        longest = max(int(lengths[list(pack)].sum()) for pack in packs)
        step = math.lcm(_LENGTH_STEP, self._multiples[1])
        return min(-(-max(longest, 1) // step) * step, self._seq_length)

    def _built(self, indices: list[int], length: int | None) -> PackedBatch:
        """One batch; a damaged image is recorded, and reported once."""
        batch = self._build(indices, length=length)
        for image, reason in batch.damaged.items():
            if image not in self.damaged and len(self.damaged) < _MOST_REPORTED:
                print(f"{reason}; a grey one takes its place", file=sys.stderr)
            self.damaged[image] = reason
        if self._upload is None:
            return batch
        return replace(batch, pixels={name: self._upload(view) for name, view in batch.pixels.items()})

    def _prepare(self, consumed: int, count: int) -> None:
        """Plans the step that is likely to come next and begins its first batches.

        Errors here are ignored, since the current step is valid and the run may never take the next one. They are
        raised when `step` is called for it.
        """
        if self._expected is not None and self._expected[0] == (consumed, count):
            return
        with suppress(Exception):
            step = self._run_step(consumed, count)
            assert isinstance(step.batches, LazyBatches)
            step.batches.start(AHEAD)
            self._expected = (consumed, count), step
