"""Samples to one microbatch: a pack of expanded samples, end to end, with everything the model needs to know.

Images are expanded here and nowhere else: a placeholder becomes the rows that the patch embedding will fill
(CLS, then each row of cells with its row-end token), so lengths, positions, labels and cu_seqlens are exact on
every pipeline stage before a pixel is read.

Letters: T = tokens of the pack with padding, S = samples, I = images, P = patches (4 a cell), n = tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.errors import DataError
from megatron_eve.data.geometry import PATCH_SIZE, ImageGeometry
from megatron_eve.data.images import ImageError
from megatron_eve.data.images.backends import stand_in
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder, ImageTask, Prepared
from megatron_eve.data.images.patches import padded_square
from megatron_eve.data.images.pillow import PillowDecoder
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID

PATCH_VALUES = 3 * PATCH_SIZE * PATCH_SIZE
FILLER_SAMPLE_ID = -1
# Padding is cut into samples of this many tokens: attention over one long one would cost its square.
_LONGEST_FILLER = 512

# Tokens, labels and rows of images of a sample, as `expand` gives them.
Text = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
_NO_TEXT: Text = (np.zeros(0, dtype=np.int64),) * 3


class VisionDataset(Protocol):
    """What batches and loaders ask of a dataset; ``IndexedVisionDataset`` and ``MockDataset`` provide it."""

    @property
    def info(self) -> Any:
        """Holds ``apply_exif`` and ``max_pixels``, the settings the images were measured under."""

    @property
    def samples(self) -> Any:
        """[samples] indexed as a structured array with the fields ``length, labels, first_image, num_images``."""

    def __len__(self) -> int:
        """Number of samples."""

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Expanded tokens of each sample."""

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and unshifted labels of a sample, images not expanded."""

    def image_bytes(self, image: int) -> bytes:
        """The image file."""

    def stored_pixels(self, image: int) -> Any:
        """The image as stored already decoded (`indexed.StoredPixels`), or None where it is a file."""

    def sample_name(self, index: int) -> str:
        """What a message calls a sample."""

    def image_name(self, image: int) -> str:
        """What a message calls an image."""

    def image_geometry(self, image: int) -> ImageGeometry:
        """Resized size and token grid, known without decoding."""

    def will_need(self, indices: NDArray[np.int64]) -> None:
        """Have the images of these samples read ahead, where that means anything."""


@dataclass(frozen=True)
class TeacherShare:
    """Which images of a pack a rank prepares for the teacher: equal contiguous shares, the last ones may be short."""

    patch_size: int
    """Side of the teacher's patches in pixels."""
    rank: int
    ranks: int
    """Ranks that share the teacher's work on a pack."""

    def images(self, count: int) -> range:
        """Positions of this rank's images among the ``count`` of a pack."""
        each = self.each(count)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def each(self, count: int) -> int:
        """Images that every rank has room for."""
        return -(-count // self.ranks)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One microbatch: one pack. All tensors are on the CPU, int64 unless said.

    Sample s owns rows ``cu_seqlens_padded[s] .. cu_seqlens_padded[s + 1]``, of which the first
    ``cu_seqlens[s + 1] - cu_seqlens[s]`` are real.
    """

    tokens: torch.Tensor
    """[T] token ids; image rows and padding hold 0."""
    labels: torch.Tensor
    """[T] the token that follows within the sample, IGNORE_INDEX where nothing is to be learned."""
    position_ids: torch.Tensor
    """[T] count from 0 in each sample, through its padding."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32, bounds of the samples as if there were no padding."""
    cu_seqlens_padded: torch.Tensor
    """[S + 1] int32, bounds of the samples with their padding; the last is T."""
    max_seqlen: int
    """Longest sample with its padding."""
    image_starts: torch.Tensor
    """[I] row of each image's CLS."""
    image_grids: torch.Tensor
    """[I, 2] rows and columns of cells of each image."""
    patches: torch.Tensor | None
    """[P, 588] uint8, images in order; a patch is (channel, y, x). None on a rank that needs no pixels."""
    teacher_images: torch.Tensor | None
    """[share of I, S, S, 3] uint8, this rank's share of the images as the teacher sees them; None without teacher."""
    sample_ids: torch.Tensor
    """[S] index in the dataset; -1 = filler, the single token of an empty pack or what makes it as long as others."""
    damaged: dict[int, str]
    """Images that this rank could not decode, with their names and why; a grey stand-in has their place."""

    @property
    def num_patches(self) -> int:
        """P, known from the geometry also where ``patches`` is None."""
        return 4 * int(self.image_grids.prod(dim=1).sum())


def expand(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], geometries: Sequence[ImageGeometry]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replaces each image placeholder by the rows of its image, then shifts the labels.

    Args:
        tokens: [n] token ids with IMAGE_TOKEN_ID once for each image.
        labels: [n] unshifted labels.
        geometries: of the sample's images, in order.

    Returns:
        tokens [length] with 0 in image rows; labels [length] shifted by one, so that row t holds what row t + 1
        is (the last row of an image predicts the first text token after it); [images] row of each CLS.

    Raises:
        DataError: as many placeholders as images are wanted.
    """
    is_image = tokens == IMAGE_TOKEN_ID
    if int(is_image.sum()) != len(geometries):
        raise DataError(
            f"a sample has {int(is_image.sum())} image placeholders and {len(geometries)} images: preprocess it again"
        )
    rows = np.ones(len(tokens), dtype=np.int64)
    rows[is_image] = [geometry.tokens for geometry in geometries]
    expanded = np.repeat(np.where(is_image, 0, tokens), rows)
    unshifted = np.repeat(np.where(is_image, IGNORE_INDEX, labels), rows)
    shifted = np.append(unshifted[1:], IGNORE_INDEX)
    starts = (np.cumsum(rows) - rows)[is_image]
    return expanded, shifted, starts


def padding_multiples(tensor_parallel: int, context_parallel: int, row_multiple: int = 1) -> tuple[int, int]:
    """(what each sample is padded to a multiple of, what the whole pack is padded to a multiple of).

    Context parallelism cuts every sample into ``2 * cp`` chunks (zig-zag, so that causal work is even); sequence
    parallelism cuts the rank's share of the pack into ``tp``, each a multiple of ``row_multiple`` (FP8 wants that).
    """
    if context_parallel > 1:
        return 2 * context_parallel, context_parallel * math.lcm(2, row_multiple) * tensor_parallel
    return 1, tensor_parallel * row_multiple


def padded_lengths(lengths: NDArray[np.int64], context_parallel: int) -> NDArray[np.int64]:
    """[n] what each sample occupies in a pack under context parallelism."""
    multiple, _ = padding_multiples(1, context_parallel)
    return -(-lengths // multiple) * multiple


def build_batch(
    dataset: VisionDataset,
    sample_indices: Sequence[int],
    *,
    tensor_parallel: int,
    context_parallel: int,
    row_multiple: int = 1,
    length: int | None = None,
    with_pixels: bool,
    teacher: TeacherShare | None = None,
    decoder: ImageDecoder | None = None,
) -> PackedBatch:
    """Builds the microbatch of one pack.

    Args:
        dataset: where the samples lie.
        sample_indices: rows of the dataset, in the order they take in the pack. None at all gives a pack with a
            filler: a single token 0 without a label, so that every rank has a microbatch to run.
        tensor_parallel, context_parallel, row_multiple: set the padding (see :func:`padding_multiples`); what the
            whole pack needs on top goes to its last sample.
        length: tokens of the whole pack; what its samples leave of it are samples of padding alone, of no real token.
            None makes it as long as it has to be.
        with_pixels: decode the images; False leaves ``patches`` None and reads no image.
        teacher: prepare this share of the images for the teacher too.
        decoder: decodes them; by default the plain reference.

    Raises:
        ValueError: a length that the samples do not fit into, or that the layout cannot cut.
        DataError: a sample whose text and images do not match.
    """
    texts, image_rows = _texts(dataset, sample_indices)
    lengths = np.array([len(tokens) for tokens, _, _ in texts], dtype=np.int64)
    padded = padded_lengths(lengths, context_parallel)
    multiples = padding_multiples(tensor_parallel, context_parallel, row_multiple)
    if length is None:
        padded[-1] += -int(padded.sum()) % multiples[1]
    else:
        fillers = _fillers(length, int(padded.sum()), *multiples)
        padded, lengths = np.append(padded, fillers), np.append(lengths, np.zeros_like(fillers))
        texts += [_NO_TEXT] * len(fillers)
    bounds = np.append(0, np.cumsum(padded))
    total, starts = int(bounds[-1]), bounds[:-1]

    tokens, labels, image_starts = _placed(texts, lengths, starts, total)
    geometries = [dataset.image_geometry(image) for image in image_rows]
    grids = np.array([(g.rows, g.columns) for g in geometries], dtype=np.int64).reshape(-1, 2)

    patches, teacher_images, damaged = _decode(dataset, image_rows, geometries, with_pixels, teacher, decoder)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, padded)),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        cu_seqlens_padded=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(padded.max()),
        image_starts=torch.from_numpy(image_starts),
        image_grids=torch.from_numpy(grids),
        patches=patches,
        teacher_images=teacher_images,
        sample_ids=torch.tensor(
            [*sample_indices, *[FILLER_SAMPLE_ID] * (len(texts) - len(sample_indices))], dtype=torch.int64
        ),
        damaged=damaged,
    )


def _placed(
    texts: Sequence[Text], lengths: NDArray[np.int64], starts: NDArray[np.int64], total: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and labels [total] of a pack, and where its images begin, from its samples and where these begin."""
    tokens = np.zeros(total, dtype=np.int64)
    labels = np.full(total, IGNORE_INDEX, dtype=np.int64)
    real = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    tokens[real] = np.concatenate([text[0] for text in texts])
    labels[real] = np.concatenate([text[1] for text in texts])
    return (
        tokens,
        labels,
        np.concatenate([text[2] + start for text, start in zip(texts, starts, strict=True)]),
    )


def _texts(dataset: VisionDataset, sample_indices: Sequence[int]) -> tuple[list[Text], list[int]]:
    """Expanded samples, or the filler of an empty pack, and the rows of their images in the dataset."""
    texts: list[Text] = []
    image_rows: list[int] = []
    for index in sample_indices:
        sample = dataset.samples[index]
        images = range(int(sample["first_image"]), int(sample["first_image"]) + int(sample["num_images"]))
        texts.append(expand(*dataset.text(index), [dataset.image_geometry(image) for image in images]))
        image_rows.extend(images)
    if not texts:
        texts.append((np.zeros(1, dtype=np.int64), np.full(1, IGNORE_INDEX, dtype=np.int64), _NO_TEXT[2]))
    return texts, image_rows


def _fillers(length: int, used: int, sample_multiple: int, pack_multiple: int) -> NDArray[np.int64]:
    """Lengths of the samples of padding that make a pack of ``used`` tokens ``length`` long."""
    rest = length - used
    if rest < 0 or length % pack_multiple:
        raise ValueError(
            f"a pack of {used} tokens cannot be made {length} long in multiples of {pack_multiple}"
        )
    each = max(_LONGEST_FILLER // sample_multiple, 1) * sample_multiple
    return np.diff(np.append(np.arange(0, rest, each, dtype=np.int64), rest)) if rest else _NO_TEXT[0]


def decode_settings(dataset: VisionDataset, teacher: TeacherShare | None) -> DecodeSettings:
    """What decoding a dataset's pictures needs to know, beside the pictures."""
    info = dataset.info
    patch_size = teacher.patch_size if teacher else PATCH_SIZE
    return DecodeSettings(info.apply_exif, info.max_pixels, info.teacher_size, patch_size)


def _decode(
    dataset: VisionDataset,
    image_rows: Sequence[int],
    geometries: Sequence[ImageGeometry],
    with_pixels: bool,
    teacher: TeacherShare | None,
    decoder: ImageDecoder | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, dict[int, str]]:
    """Patches [P, 588] of the given images, this rank's share of them for the teacher, and what was damaged.

    Each file is decoded once; one that cannot be is replaced by its stand-in. Stored pixels are taken as they are.
    """
    settings = decode_settings(dataset, teacher)
    share = teacher.images(len(image_rows)) if teacher else range(0)
    wanted = [i for i in range(len(image_rows)) if with_pixels or i in share]
    found: dict[int, Prepared] = {}
    tasks: dict[int, ImageTask] = {}
    for i in wanted:
        stored = dataset.stored_pixels(image_rows[i])
        if stored is None:
            tasks[i] = ImageTask(dataset.image_bytes(image_rows[i]), geometries[i], with_pixels, i in share)
            continue
        square = None
        if i in share:
            square = padded_square(stored.teacher_picture, settings.teacher_side, settings.teacher_patch_size)
        found[i] = Prepared(
            torch.from_numpy(stored.patches) if with_pixels else None,
            None if square is None else torch.from_numpy(square),
        )
    damaged: dict[int, str] = {}
    if tasks:
        results = (decoder or PillowDecoder(settings)).prepare(list(tasks.values()))
        for (i, task), result in zip(tasks.items(), results, strict=True):
            if isinstance(result, ImageError):
                damaged[image_rows[i]] = f"{dataset.image_name(image_rows[i])}: {result}"
                result = stand_in(task, settings)
            found[i] = result
    prepared = [found[i] for i in wanted]
    patches = [one.patches for one in prepared if one.patches is not None]
    squares = [one.square for one in prepared if one.square is not None]
    side = settings.teacher_side
    nothing = (
        torch.empty(0, PATCH_VALUES, dtype=torch.uint8),
        torch.empty(0, side, side, 3, dtype=torch.uint8),
    )
    return (
        _together(torch.cat, patches, nothing[0]) if with_pixels else None,
        _together(torch.stack, squares, nothing[1]) if teacher else None,
        damaged,
    )


def _together(
    join: Callable[[list[torch.Tensor]], torch.Tensor], parts: list[torch.Tensor], nothing: torch.Tensor
) -> torch.Tensor:
    """Join tensors, of which a stand-in may lie on the host and the others on a GPU."""
    if not parts:
        return nothing
    device = next((part.device for part in parts if part.is_cuda), parts[0].device)
    return join([part.to(device) for part in parts])
