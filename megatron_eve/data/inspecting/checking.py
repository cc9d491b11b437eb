"""Check a dataset: every record, every token id and label, every picture, and the digest of its content.

Samples are taken in chunks. While threads decode a chunk's pictures, its texts are compared with their records and
the digest goes on, so memory does not grow with the dataset.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.content_digest import ContentDigest, digest_input_of_image, digest_input_of_text
from megatron_eve.data.format.drawn import drawn_counts
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import AnyDataset, MergedDataset
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.inspecting.pictures import read_picture, stored_bytes, stored_sizes

_CHUNK = 64  # samples
_CHUNKS_AHEAD = 2  # for each thread


@dataclass(frozen=True)
class Damage:
    """One damaged row, image or file.

    Attributes:
        where: the row, image or file.
        reason: what is wrong with it.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class CheckCounts:
    """Counts of a check so far.

    Attributes:
        samples, images: how many.
        num_bytes: bytes of their texts and files.
        damaged: number of damaged things.
        without_digest: prefixes of datasets whose manifest has no digest of the content.
    """

    samples: int = 0
    images: int = 0
    num_bytes: int = 0
    damaged: int = 0
    without_digest: list[str] = field(default_factory=list)


def parts_of(dataset: AnyDataset) -> list[IndexedVisionDataset]:
    """The datasets that hold the samples: the parts of a merged dataset, in order, or the dataset itself."""
    if isinstance(dataset, MergedDataset):
        return [part for one in dataset.parts for part in parts_of(one)]
    return [dataset]


def check_dataset(
    dataset: AnyDataset, tally: CheckCounts, *, workers: int, advance: Callable[[int], Any]
) -> Iterator[Damage]:
    """Read all of a dataset and yield what is damaged, as it is found.

    Args:
        dataset: the dataset to check, merged or not.
        tally: updated while the check runs.
        workers: threads that decode pictures.
        advance: called with the bytes that were checked since the last call.
    """
    with ThreadPoolExecutor(workers) as pool:
        for part in parts_of(dataset):
            for damage in _check_part(part, tally, pool, workers, advance):
                tally.damaged += 1
                yield damage


def _check_part(
    part: IndexedVisionDataset,
    tally: CheckCounts,
    pool: ThreadPoolExecutor,
    workers: int,
    advance: Callable[[int], Any],
) -> Iterator[Damage]:
    samples, images = len(part), part.info.num_images
    digest: ContentDigest | None = ContentDigest()
    totals = dict.fromkeys(("num_tokens", "num_text_tokens", "num_labels", "num_images"), 0)
    longest = visual_labels = 0
    next_image: int | None = 0  # None after a damaged row, whose record may be wrong
    pending: deque[tuple[Future[list[Damage]], int]] = deque()
    if images:
        with contextlib.suppress(DataError):
            stored_bytes(part, 0)  # opens the file before the threads do

    def count(num_bytes: int) -> None:
        tally.num_bytes += num_bytes
        advance(num_bytes)

    def decoded() -> list[Damage]:
        future, num_bytes = pending.popleft()
        damages = future.result()
        count(num_bytes)
        return damages

    for start in range(0, samples, _CHUNK):
        stop = min(start + _CHUNK, samples)
        # Divided by number, not by record, so that pictures are checked even if a record is damaged.
        first, last = start * images // samples, stop * images // samples
        if last > first:
            num_bytes = _share(part.info.stored_bytes, first, last, images)
            pending.append((pool.submit(_check_images, part, first, last), num_bytes))
        records = part.samples[start:stop]
        for index in range(start, stop):
            damage = _check_sample(part, index, next_image, digest)
            record = records[index - start]
            next_image = int(record["first_image"]) + int(record["num_images"])
            if damage:
                digest = next_image = None
                yield damage
        for name, column in (
            ("num_tokens", "length"),
            ("num_text_tokens", "text_length"),
            ("num_labels", "labels"),
            ("num_images", "num_images"),
        ):
            totals[name] += int(records[column].astype(np.int64).sum())
        longest = max(longest, int(records["length"].max()))
        visual_labels += int(part.visual_labels(np.arange(start, stop)).sum())
        tally.samples += stop - start
        tally.images += last - first
        count(_share(part.info.text_bytes, start, stop, samples))
        while len(pending) > _CHUNKS_AHEAD * workers:
            yield from decoded()
    while pending:
        yield from decoded()
    yield from _check_manifest(part, {**totals, "longest_length": longest}, visual_labels)
    recorded = part.info.content_sha256
    if not recorded:
        tally.without_digest.append(part.prefix)
    elif digest is not None and digest.hexdigest() != recorded:
        yield Damage(
            part.prefix + MANIFEST,
            f"content_sha256 is {recorded[:12]}... and the content's is {digest.hexdigest()[:12]}...: bytes were "
            "changed since it was written",
        )


def _check_sample(
    part: IndexedVisionDataset, index: int, next_image: int | None, digest: ContentDigest | None
) -> Damage | None:
    """Compare a sample's text with its record and add it to the digest."""
    record = part.samples[index]
    first, count = int(record["first_image"]), int(record["num_images"])
    if next_image is not None and first != next_image:
        reason = (
            f"its record says that its images begin at {first}, where the row before ends at {next_image}"
        )
        return Damage(part.sample_name(index), reason)
    try:
        tokens, labels = part.text(index)
        if digest is not None:
            for image in range(first, first + count):
                size = part.images[image]
                data = stored_bytes(part, image)
                digest.add(digest_input_of_image(int(size["width"]), int(size["height"]), data))
            digest.add(digest_input_of_text(tokens, labels))
    except DataError as error:
        return Damage(part.sample_name(index), str(error))
    return None


def _check_images(part: IndexedVisionDataset, first: int, last: int) -> list[Damage]:
    """Decode images `first` to `last` - 1."""
    damages = []
    for image in range(first, last):
        record = part.images[image]
        width, height = int(record["width"]), int(record["height"])
        try:
            size = read_picture(part, image).size
            expected = stored_sizes(part, image)
        except (DataError, SkipRow) as error:
            reason = str(error)
        else:
            if size in expected:
                continue
            reason = f"it has {size[0]} x {size[1]} pixels and its record says {width} x {height}"
        # A search in the mapped records; reading a whole column would copy it.
        row = max(bisect_right(part.samples, image, key=lambda sample: int(sample["first_image"])) - 1, 0)
        damages.append(Damage(f"{part.sample_name(row)}, image {image}", reason))
    return damages


def _share(num_bytes: int, first: int, last: int, rows: int) -> int:
    """Bytes of rows `first` to `last` - 1 of a file, estimated, since their records may be damaged."""
    return num_bytes * last // rows - num_bytes * first // rows


def _check_manifest(
    part: IndexedVisionDataset, values: dict[str, int], visual_labels: int
) -> Iterator[Damage]:
    for name, value in values.items():
        recorded = getattr(part.info, name)
        if recorded != value:
            yield Damage(part.prefix + MANIFEST, f"{name} is {recorded} and the records have {value}")
    if (recorded := drawn_counts(part.info)[1]) != visual_labels:
        reason = f"visual_labels of drawn is {recorded} and the images to draw have {visual_labels} rows"
        yield Damage(part.prefix + MANIFEST, reason)
