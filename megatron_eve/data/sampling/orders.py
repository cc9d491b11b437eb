"""Sample orders: which sample a run takes at which position, for splits, blends and batches of one modality.

An order is a function from positions (0 = the first sample of the run) to samples. It has no state except its
settings, so a run can resume anywhere, and the order does not depend on the parallel layout. The data of a run are
`DatasetSlice`s: the training or held-out side of the split of each dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.config.blend import BLEND_PERIOD
from megatron_eve.data.format.manifest import megatron_datasets
from megatron_eve.data.sampling.permutation import inverse_sample_order, sample_order

Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Maps int64 positions of a run, of any shape, to the samples at them."""

# The split does not depend on the seed of a run: no run is evaluated on samples that another run trained on.
_SPLIT_KEY = 0x53504C4954
_CHUNK = 1 << 20


def _empty_ranks() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class DatasetSlice:
    """One side of the split of a dataset: the samples with ranks start .. stop - 1 in its fixed random order.

    Attributes:
        name: name of the dataset, for reports.
        first: index of the dataset's first sample, counted over all datasets of the run.
        size: number of samples of the dataset.
        start, stop: range of ranks; 0 and size take all samples, in the order on disk.
        dropped: int64 ranks in this range that the run leaves out, ascending; see `without`.
    """

    name: str
    first: int
    size: int
    start: int
    stop: int
    dropped: NDArray[np.int64] = field(default_factory=_empty_ranks, compare=False, repr=False)

    def __len__(self) -> int:
        return self.stop - self.start - len(self.dropped)

    def samples(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples of the given ranks, 0 .. len - 1, counted over all datasets of the run."""
        if len(self.dropped):
            # dropped[i] - i kept ranks precede the i-th dropped one.
            before = self.dropped - np.arange(len(self.dropped))
            ranks = ranks + np.searchsorted(before, ranks, side="right")
        if self.stop - self.start == self.size:
            return self.first + ranks
        return self.first + sample_order(self.start + ranks, self.size, _SPLIT_KEY)

    def without(self, rows: NDArray[np.int64]) -> DatasetSlice:
        """Copy of this part without some rows of its dataset; rows that are not in it are ignored.

        The other samples keep their order, and the bounds of the split do not move, so which samples are held out does
        not depend on which are dropped.

        Args:
            rows: int64 [n] rows of the dataset, counted from 0.
        """
        ranks = rows
        if self.stop - self.start != self.size:
            ranks = inverse_sample_order(rows, self.size, _SPLIT_KEY) - self.start
        here = (ranks >= 0) & (ranks < self.stop - self.start)
        return replace(self, dropped=np.unique(ranks[here]))

    def dropped_fingerprint(self) -> str:
        """Number and short hash of the samples that are left out; an empty string if there are none."""
        if not len(self.dropped):
            return ""
        return f"{len(self.dropped)} ({hashlib.sha256(self.dropped.tobytes()).hexdigest()[:12]})"


def split_dataset(name: str, first: int, size: int, held_out: float) -> tuple[DatasetSlice, DatasetSlice]:
    """Split a dataset at random into training and held-out samples, the same way in every run.

    Args:
        name, first, size: of the dataset (see `DatasetSlice`).
        held_out: fraction of the samples that are held out, 0 .. 1; rounded to whole samples.

    Returns:
        The training part and the held-out part.
    """
    bound = size - round(size * held_out)
    return DatasetSlice(name, first, size, 0, bound), DatasetSlice(name, first, size, bound, size)


class ShuffledOrder:
    """Order over all parts together: every sample once per epoch, one epoch after the other."""

    def __init__(self, parts: Sequence[DatasetSlice], seed: int, shuffle: bool = True) -> None:
        """
        Args:
            parts: of the datasets; together they hold at least one sample.
            seed: of the order within each epoch.
            shuffle: False keeps the order on disk, from the first part to the last.
        """
        self._parts, self._seed, self._shuffle = parts, seed, shuffle
        self._size = sum(map(len, parts))

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at positions of the run."""
        return _samples_at_ranks(self._parts, sample_order(positions, self._size, self._seed, self._shuffle))


class BlendedOrder:
    """Order that blends parts by weight; each part has its own epochs.

    megatron-core's blending (next comes the part that is furthest behind its share) fills a period of `BLEND_PERIOD`
    positions, which then repeats. Within a period every dataset is within a sample or two of its share, over a run
    within about 1 / `BLEND_PERIOD`. A run of any length needs one small table instead of an index as long as the run.
    """

    def __init__(
        self, parts: Sequence[DatasetSlice], weights: Sequence[float], seed: int, shuffle: bool = True
    ) -> None:
        """
        Args:
            parts: of the datasets, none of them empty.
            weights: positive weight of each part, normalised here; no share may be below 1 / `BLEND_PERIOD`.
            seed, shuffle: as for `ShuffledOrder`, within each part.
        """
        self._parts, self._seed, self._shuffle = parts, seed, shuffle
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        self._part = np.zeros(BLEND_PERIOD, dtype=np.int16)
        self._rank = np.zeros(BLEND_PERIOD, dtype=np.int64)
        megatron_datasets("helpers").build_blending_indices(
            self._part, self._rank, shares, len(parts), BLEND_PERIOD, False
        )
        self._quotas = np.bincount(self._part, minlength=len(parts))

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at positions of the run."""
        positions = np.asarray(positions, dtype=np.int64)
        periods, places = np.divmod(positions, BLEND_PERIOD)
        which = self._part[places]
        ranks = periods * self._quotas[which] + self._rank[places]
        samples = np.empty_like(positions)
        for number in np.unique(which):
            part, here = self._parts[number], which == number
            order = sample_order(ranks[here], len(part), self._seed + int(number), self._shuffle)
            samples[here] = part.samples(order)
        return samples


class GroupedOrder:
    """Order that groups samples with images and samples of text alone into separate batches, in random order.

    One epoch is one pass over all parts. The published stage 3 draws its batches this way (`group_by_modality_length`,
    LLaVA's trainer); packing makes its second purpose, batches of similar length, unnecessary. Samples that do not fill
    a batch of their modality go into mixed batches, as in the published code: at most two per epoch, and those that
    an epoch shares with its neighbours.
    """

    def __init__(
        self, parts: Sequence[DatasetSlice], by_modality: NDArray[np.int64], batch_size: int, seed: int
    ) -> None:
        """
        Args:
            parts: of the datasets.
            by_modality: result of :func:`by_modality` for these parts.
            batch_size: samples of one optimizer step; steps begin at its multiples.
            seed: for the order of samples and of batches.
        """
        self._parts, self._members, self._batch, self._seed = parts, by_modality[1:], batch_size, seed
        self._images = int(by_modality[0])
        self._texts = len(self._members) - self._images

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples at positions of the run."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs = positions // len(self._members)
        places = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places[here] = self._epoch(int(epoch), positions[here])
        return _samples_at_ranks(self._parts, self._members[places])

    def _epoch(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices into `_members` for positions that all lie in one epoch."""
        batch, start, stop = self._batch, epoch * len(self._members), (epoch + 1) * len(self._members)
        first = -(-start // batch)  # first step that lies completely in this epoch
        steps = max(0, stop // batch - first)
        image_steps = min(self._images // batch, steps)
        text_steps = min(self._texts // batch, steps - image_steps)

        # Modality at each position, and the rank among the epoch's samples of that modality, in shuffled order.
        step, within = np.divmod(positions, batch)
        whole = (step >= first) & (step < first + steps)
        slot = np.full_like(positions, -1)  # shuffled index of a complete step in its epoch
        slot[whole] = self._draw(step[whole] - first, steps, epoch, 0)
        image = whole & (slot < image_steps)
        text = whole & (slot >= image_steps) & (slot < image_steps + text_steps)
        rank = slot * batch + within - np.where(text, image_steps * batch, 0)

        # Remaining samples fill the positions before the first complete step, mixed steps, and those after the last.
        before = first * batch - start
        left = rank - (image_steps + text_steps) * batch + before
        left = np.where(step < first, positions - start, left)
        left = np.where(step >= first + steps, positions - start - (image_steps + text_steps) * batch, left)
        rest = ~image & ~text
        spare_images = self._images - image_steps * batch
        spare = spare_images + self._texts - text_steps * batch
        drawn = self._draw(left[rest], spare, epoch, 1)
        image[rest] = drawn < spare_images
        rank[rest] = drawn + np.where(
            drawn < spare_images, image_steps * batch, text_steps * batch - spare_images
        )

        places = np.empty_like(positions)
        places[image] = self._draw(rank[image], self._images, epoch, 2)
        places[~image] = self._images + self._draw(rank[~image], self._texts, epoch, 3)
        return places

    def _draw(self, ranks: NDArray[np.int64], size: int, epoch: int, purpose: int) -> NDArray[np.int64]:
        """A permutation of 0 .. size - 1, different for each epoch and purpose."""
        return sample_order(epoch * size + ranks, size, self._seed + purpose) if len(ranks) else ranks


def by_modality(samples: Any, parts: Sequence[DatasetSlice]) -> NDArray[np.int64]:
    """Ranks of samples with images, then of samples of text alone; the input of `GroupedOrder`.

    Args:
        samples: SAMPLE_DTYPE of all datasets, indexed like an array.
        parts: of the datasets.

    Returns:
        [1 + n] int64: the number of samples with images, then the ranks 0 .. n - 1 over all parts. 8 bytes per sample.
    """
    found = []
    for part in parts:
        on_disk = np.zeros(
            part.size, dtype=bool
        )  # records are read in the order on disk, not in that of the split
        for start in range(0, part.size, _CHUNK):
            stop = min(start + _CHUNK, part.size)
            records = samples[np.arange(part.first + start, part.first + stop)]
            on_disk[start:stop] = records["num_images"] > 0
        found.append(on_disk[part.samples(np.arange(len(part), dtype=np.int64)) - part.first])
    has_image = np.concatenate(found)
    members = [np.flatnonzero(has_image), np.flatnonzero(~has_image)]
    return np.concatenate([[len(members[0])], *members])


def _samples_at_ranks(parts: Sequence[DatasetSlice], ranks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Samples at ranks that are counted over all parts, one part after the other."""
    bounds = np.cumsum([len(part) for part in parts])
    which = np.searchsorted(bounds, ranks, side="right")
    samples = np.empty_like(ranks)
    for number in np.unique(which):
        part, here = parts[number], which == number
        samples[here] = part.samples(ranks[here] - (bounds[number] - len(part)))
    return samples
