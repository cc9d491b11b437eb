"""Samples to one microbatch: a pack of expanded samples, end to end, with everything the model needs to know.

Images are expanded here and nowhere else: a placeholder becomes the rows that the image will fill, as its plan says, so
lengths, positions, labels and cu_seqlens are exact on every pipeline stage before a pixel is read.

Letters: T = tokens of the pack with padding, S = samples, I = images, n = tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.errors import DataError
from megatron_eve.data.images.interface import ImageDecoder
from megatron_eve.data.pixels import decode_pixels, pack_shapes
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.model_parts import ImageShare

PADDING_SAMPLE_ID = -1
# Padding is cut into samples of this many tokens: attention over one long one would cost its square.
_LONGEST_PADDING_SAMPLE = 512

# Tokens, labels and rows of images of a sample, as `expand` gives them.
Text = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
_NO_TEXT: Text = (np.zeros(0, dtype=np.int64),) * 3


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
    image_starts: torch.Tensor
    """[I] first row of each image, or of each of its tiles: these count as images in all fields."""
    image_rows: torch.Tensor
    """[I] rows of each image (`ImagePlan.tile_rows`)."""
    image_grids: torch.Tensor
    """[I, 2] rows and columns of each image's features (`ImagePlan.grid`)."""
    pixels: dict[str, torch.Tensor]
    """uint8, by view: those that this rank decodes, of all images or of its share of them, in order. The patches of
    images lie one behind the other; views that are not cut are stacked."""
    pixel_shapes: dict[str, tuple[int, ...]]
    """Shape of each view of all images, as `pixels` would have it: known on every rank, without decoding."""
    sample_ids: torch.Tensor
    """[S] index in the dataset; -1 = a padding sample, which fills an empty pack or makes one as long as others."""
    damaged: dict[int, str]
    """Images that this rank could not decode, with their names and why; a placeholder image has their place."""
    drawn: torch.Tensor
    """[I] bool, is each image to be drawn (predicted)? Rows `image_starts - 1` .. `image_starts + image_rows - 2` of
    one that is predict its codes; they have no label."""
    codes: torch.Tensor | None = None
    """[V, D] codes of all images, image after image, row by row within one; V = the sum of `image_rows`. None where
    this rank reads none."""


def expand(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], plans: Sequence[ImagePlan]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Replaces each image placeholder by the rows of its image, then shifts the labels.

    Args:
        tokens: [n] token ids with IMAGE_TOKEN_ID once for each image, or for each of its tiles.
        labels: [n] unshifted labels; IMAGE_TOKEN_ID at a placeholder says that the image is to be drawn.
        plans: of the sample's images, in order.

    Returns:
        tokens [length] with 0 in image rows; labels [length] shifted by one, so that row t holds what row t + 1
        is (the last row of an image predicts the first text token after it); [images or tiles] first row of each.

    Raises:
        DataError: as many placeholders as images are wanted.
    """
    is_image = tokens == IMAGE_TOKEN_ID
    image_rows = [rows for plan in plans for rows in plan.tile_rows]
    if int(is_image.sum()) != len(image_rows):
        raise DataError(
            f"a sample has {int(is_image.sum())} image placeholders and {len(image_rows)} images: preprocess it again"
        )
    rows = np.ones(len(tokens), dtype=np.int64)
    rows[is_image] = image_rows
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
    views: Collection[str],
    shared_views: Collection[str] = (),
    share: ImageShare | None = None,
    decoder: ImageDecoder | None = None,
    codes: bool = False,
) -> PackedBatch:
    """Builds the microbatch of one pack.

    Args:
        dataset: where the samples lie.
        sample_indices: rows of the dataset, in the order they take in the pack. None at all gives a pack with a
            padding sample: a single token 0 without a label, so that every rank has a microbatch to run.
        tensor_parallel, context_parallel, row_multiple: set the padding (see :func:`padding_multiples`); what the
            whole pack needs on top goes to its last sample.
        length: tokens of the whole pack; what its samples leave of it are samples of padding alone, of no real token.
            None makes it as long as it has to be.
        views: decode these views of all images.
        shared_views: decode these views of this rank's share of the images.
        share: which images those are; without one there are no shared views.
        decoder: decodes them; by default the plain reference.
        codes: read the codes of all images.

    Raises:
        ValueError: a length that the samples do not fit into, or that the layout cannot cut.
        DataError: a sample whose text and images do not match, or codes that are missing or damaged.
    """
    texts, images, plans, drawn = _texts(dataset, sample_indices)
    lengths = np.array([len(tokens) for tokens, _, _ in texts], dtype=np.int64)
    padded = padded_lengths(lengths, context_parallel)
    multiples = padding_multiples(tensor_parallel, context_parallel, row_multiple)
    if length is None:
        padded[-1] += -int(padded.sum()) % multiples[1]
    else:
        padding_lengths = _padding_samples(length, int(padded.sum()), *multiples)
        padded, lengths = (
            np.append(padded, padding_lengths),
            np.append(lengths, np.zeros_like(padding_lengths)),
        )
        texts += [_NO_TEXT] * len(padding_lengths)
    bounds = np.append(0, np.cumsum(padded))
    total, starts = int(bounds[-1]), bounds[:-1]

    tokens, labels, image_starts = _placed(texts, lengths, starts, total)
    grids = [plan.grid for plan in plans for _ in range(plan.tiles)]

    pixels, damaged = decode_pixels(dataset, images, plans, views, shared_views, share, decoder)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(np.arange(total) - np.repeat(starts, padded)),
        cu_seqlens=torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)),
        cu_seqlens_padded=torch.from_numpy(bounds.astype(np.int32)),
        image_starts=torch.from_numpy(image_starts),
        image_rows=torch.tensor([rows for plan in plans for rows in plan.tile_rows], dtype=torch.int64),
        image_grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 2),
        pixels=pixels,
        pixel_shapes=pack_shapes(plans, dataset.planner),
        sample_ids=torch.tensor(
            [*sample_indices, *[PADDING_SAMPLE_ID] * (len(texts) - len(sample_indices))], dtype=torch.int64
        ),
        damaged=damaged,
        drawn=torch.from_numpy(drawn),
        codes=_read_codes(dataset, images, plans) if codes else None,
    )


def _read_codes(dataset: VisionDataset, images: Sequence[int], plans: Sequence[ImagePlan]) -> torch.Tensor:
    """`PackedBatch.codes`.

    Raises:
        DataError: an image has codes of another number of positions than it has rows.
    """
    every = [np.zeros((0, dataset.code_depth), dtype=np.int64)]
    for image, plan in zip(images, plans, strict=True):
        codes = dataset.codes(image)
        if codes.shape[0] * codes.shape[1] != plan.rows:
            raise DataError(
                f"{dataset.image_name(image)} has {codes.shape[0]} x {codes.shape[1]} codes and {plan.rows} rows: make "
                "the codes again with the tower of the model (tools/tokenize_images.py --overwrite)"
            )
        every.append(codes.reshape(plan.rows, -1).astype(np.int64))
    return torch.from_numpy(np.concatenate(every))


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


def _texts(
    dataset: VisionDataset, sample_indices: Sequence[int]
) -> tuple[list[Text], list[int], list[ImagePlan], NDArray[np.bool_]]:
    """Expanded samples (of an empty pack its padding sample), the numbers of their images, their plans, and which of
    the images, or tiles, are to be drawn."""
    texts: list[Text] = []
    all_images: list[int] = []
    all_plans: list[ImagePlan] = []
    drawn = [np.zeros(0, dtype=np.bool_)]
    for index in sample_indices:
        sample = dataset.samples[index]
        images = range(int(sample["first_image"]), int(sample["first_image"]) + int(sample["num_images"]))
        # Refuses a sample whose record names images that are not there, or says otherwise which are drawn.
        text = tokens, labels = dataset.text(index)
        plans = [dataset.image_plan(image) for image in images]
        texts.append(expand(*text, plans))
        all_images.extend(images)
        all_plans.extend(plans)
        drawn.append(labels[tokens == IMAGE_TOKEN_ID] == IMAGE_TOKEN_ID)
    if not texts:
        texts.append((np.zeros(1, dtype=np.int64), np.full(1, IGNORE_INDEX, dtype=np.int64), _NO_TEXT[2]))
    return texts, all_images, all_plans, np.concatenate(drawn)


def _padding_samples(length: int, used: int, sample_multiple: int, pack_multiple: int) -> NDArray[np.int64]:
    """Lengths of the samples of padding that make a pack of ``used`` tokens ``length`` long."""
    rest = length - used
    if rest < 0 or length % pack_multiple:
        raise ValueError(
            f"a pack of {used} tokens cannot be made {length} long in multiples of {pack_multiple}"
        )
    each = max(_LONGEST_PADDING_SAMPLE // sample_multiple, 1) * sample_multiple
    return np.diff(np.append(np.arange(0, rest, each, dtype=np.int64), rest)) if rest else _NO_TEXT[0]
