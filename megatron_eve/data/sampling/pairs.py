"""Steps of pairs of a picture and a text, for a vision tower: each rank has a contiguous slice of the step's samples.

There are no packs and no microbatches, since a contrastive loss compares every picture of the step with every text.
The state of the loader is the number of consumed samples, as that of `loader.StepLoader`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.images.interface import ImageDecoder
from megatron_eve.data.pixels import decode_pixels
from megatron_eve.data.sampling.loader import WaitTime
from megatron_eve.data.sampling.orders import Order
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID

_COUNTED_AT_ONCE = 1 << 20  # samples


@dataclass(frozen=True)
class PairBatch:
    """The pairs of one rank.

    Attributes:
        pixels: uint8 [n, S, S, 3].
        tokens: int64 [n, T], each text filled up to T.
        damaged: images that could not be decoded, with their names and why; placeholders are in their places.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    damaged: dict[int, str]


class PairStep:
    """One step. The counts are those of the whole step, over all ranks.

    Attributes:
        sample_ids: [N] samples of the dataset, in the step's order.
        mine: places among them of this rank's pairs.
        text_tokens: token ids of all texts, as far as they are not cut, without what fills them up.
        cut: texts that are cut.
    """

    def __init__(
        self,
        sample_ids: NDArray[np.int64],
        mine: range,
        text_tokens: int,
        cut: int,
        batch: Callable[[], PairBatch],
    ) -> None:
        """``batch`` waits for this rank's pairs."""
        self.sample_ids, self.mine, self.text_tokens, self.cut = sample_ids, mine, text_tokens, cut
        self._batch = batch

    @property
    def counts(self) -> dict[str, float]:
        """What losses.jsonl says of the samples."""
        return {"tokens": self.text_tokens, "images": len(self.sample_ids), "cut_texts": self.cut}

    def batch(self) -> PairBatch:
        """This rank's pairs; may be asked for more than once."""
        return self._batch()


def slice_of(count: int, rank: int, ranks: int) -> range:
    """The places of a rank's samples among those of a step: contiguous, and as even as can be."""
    return range(count * rank // ranks, count * (rank + 1) // ranks)


class PairLoader:
    """Gives this rank's pairs of any step of a run.

    Attributes:
        damaged: images that this rank could not decode so far, with their names and why.
        wait: time for which training has waited for pairs.
    """

    def __init__(
        self,
        dataset: VisionDataset,
        order: Order,
        *,
        global_batch_size: int,
        rank: int,
        ranks: int,
        view: str,
        text_length: int,
        pad: int,
        decoder: ImageDecoder | None = None,
    ) -> None:
        """
        Args:
            dataset: samples of one picture and a text each.
            order: which of them stands at which position of the run.
            global_batch_size: samples of a full step, over all ranks.
            rank, ranks: whose pairs these are.
            view: of the picture's plan, uint8 [S, S, 3].
            text_length: T; a longer text loses what is too much, and ends in ``pad``.
            pad: the id that fills texts up.
            decoder: decodes the pictures; closed with the loader. By default the plain reference.
        """
        self._dataset, self._order = dataset, order
        self._global_batch_size, self._rank, self._ranks = global_batch_size, rank, ranks
        self._view, self._text_length, self._pad = view, text_length, pad
        self._decoder = decoder
        self.wait = WaitTime()
        self.damaged: dict[int, str] = {}
        # One thread: pictures of the next step are decoded while this one runs.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pair-loader")
        self._expected: tuple[tuple[int, int], PairStep] | None = None

    def step(self, consumed_samples: int, num_samples: int | None = None) -> PairStep:
        """The step that takes ``num_samples`` samples after the first ``consumed_samples`` of the run.

        Raises:
            ValueError: a number out of range.
        """
        count = self._global_batch_size if num_samples is None else num_samples
        if consumed_samples < 0 or not 1 <= count <= self._global_batch_size:
            raise ValueError(f"no step takes {count} samples after {consumed_samples} consumed ones")
        expected, self._expected = self._expected, None
        if expected is not None and expected[0] == (consumed_samples, count):
            return expected[1]
        return self._run_step(consumed_samples, count)

    def step_of(self, sample_ids: NDArray[np.int64]) -> PairStep:
        """A step of any samples, outside the run."""
        return self._plan(sample_ids, lambda: None)

    def read(self, sample_ids: NDArray[np.int64]) -> PairBatch:
        """Texts and pictures of any samples, all of them for this rank."""
        images = [int(self._dataset.samples[int(sample)]["first_image"]) for sample in sample_ids]
        plans = [self._dataset.image_plan(image) for image in images]
        pixels, damaged = decode_pixels(self._dataset, images, plans, (self._view,), (), None, self._decoder)
        tokens = np.full((len(sample_ids), self._text_length), self._pad, dtype=np.int64)
        for row, sample in enumerate(sample_ids):
            text, _ = self._dataset.text(int(sample))
            text = text[text != IMAGE_TOKEN_ID]
            if len(text) > self._text_length:
                text = text[: self._text_length - 1]
            tokens[row, : len(text)] = text
        return PairBatch(pixels[self._view], torch.from_numpy(tokens), damaged)

    def close(self) -> None:
        """Stop decoding."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._decoder is not None:
            self._decoder.close()

    def _run_step(self, consumed: int, count: int) -> PairStep:
        ids = self._order(np.arange(consumed, consumed + count, dtype=np.int64))
        return self._plan(ids, partial(self._prepare, consumed + count, count))

    def _prepare(self, consumed: int, count: int) -> None:
        """Begin with the step that is likely to be the next one."""
        if self._expected is None:
            self._expected = (consumed, count), self._run_step(consumed, count)

    def _plan(self, ids: NDArray[np.int64], then: Callable[[], None]) -> PairStep:
        """Plan a step, and begin to read this rank's pairs; ``then`` is called when these are asked for first."""
        lengths = self._dataset.samples[ids]["text_length"].astype(np.int64) - 1
        mine = slice_of(len(ids), self._rank, self._ranks)
        own = ids[mine.start : mine.stop]
        self._dataset.will_need(own)
        future: Future[PairBatch] = self._executor.submit(self.read, own)
        asked = False

        def batch() -> PairBatch:
            nonlocal asked
            if not asked:
                asked = True
                then()
            with self.wait.measured():
                found = future.result()
            self.damaged.update(found.damaged)
            return found

        kept = np.minimum(lengths, self._text_length)
        return PairStep(ids, mine, int(kept.sum()), int((lengths > self._text_length).sum()), batch)


def long_texts(dataset: VisionDataset, text_length: int) -> int:
    """Samples of a dataset whose texts are cut."""
    found = 0
    for start in range(0, len(dataset), _COUNTED_AT_ONCE):
        some = np.arange(start, min(start + _COUNTED_AT_ONCE, len(dataset)), dtype=np.int64)
        found += int((dataset.samples[some]["text_length"] - 1 > text_length).sum())
    return found
