from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_eve.data.batch import (
    PADDING_SAMPLE_ID,
    PackedBatch,
    build_batch,
    expand,
    padding_multiples,
)
from megatron_eve.data.errors import DataError
from megatron_eve.data.images import decode_image, view_of
from megatron_eve.data.mock import MockInfo
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.model_parts import ImageShare
from tests.data.helpers import ALL_VIEWS, encoded, picture, planner

IMG, NO = IMAGE_TOKEN_ID, IGNORE_INDEX


class ListDataset:
    """Samples as (tokens, labels, images), images as (width, height)."""

    def __init__(self, samples: list[tuple[list[int], list[int], list[tuple[int, int]]]]) -> None:
        self.info = MockInfo(vocab_size=100)
        self.planner = planner()
        self.sizes = [size for _, _, sizes in samples for size in sizes]
        self._texts = [(np.array(tokens), np.array(labels)) for tokens, labels, _ in samples]
        counts = np.array([len(sizes) for _, _, sizes in samples])
        self.samples = np.zeros(
            len(samples),
            dtype=[(name, np.int64) for name in ("length", "labels", "first_image", "num_images")],
        )
        self.samples["num_images"] = counts
        self.samples["first_image"] = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self._texts)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.samples["length"][indices]

    def text(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return self._texts[index]

    def stored_pixels(self, image: int) -> None:
        """Pictures are files here."""

    def image_bytes(self, image: int) -> bytes:
        return encoded(picture(*self.sizes[image], seed=image), "PNG")

    def sample_name(self, index: int) -> str:
        return f"sample {index}"

    def image_name(self, image: int) -> str:
        return f"image {image}"

    def image_plan(self, image: int) -> ImagePlan:
        return self.planner(*self.sizes[image])


# Grids at image size 224: a square gives 8 x 8 cells (73 rows), 1 x 8 wide gives 1 x 8 (10), 8 x 1 gives 8 x 1 (17).
SQUARE, WIDE, TALL = (50, 50), (400, 40), (40, 400)


@pytest.fixture
def dataset() -> ListDataset:
    return ListDataset(
        [
            ([1, IMG, 5, 6], [NO, NO, 5, 6], [WIDE]),
            ([1, 7, 8], [NO, 7, 8], []),
            ([1, 9, IMG, 10, IMG, 11, 2], [NO, NO, NO, 10, NO, 11, 2], [TALL, SQUARE]),
            ([IMG], [NO], [TALL]),
        ]
    )


def build(
    dataset: ListDataset, indices: list[int], tensor: int = 1, context: int = 1, pixels: bool = True
) -> PackedBatch:
    views = ["patches"] if pixels else []
    return build_batch(dataset, indices, tensor_parallel=tensor, context_parallel=context, views=views)


def test_expand_gives_each_image_its_rows_and_shifts_labels_afterwards() -> None:
    wide = planner()(*WIDE)
    assert (wide.grid, wide.rows) == ((1, 8), 10)
    tokens, labels, starts = expand(np.array([1, IMG, 5, 6]), np.array([NO, NO, 5, 6]), [wide])
    assert tokens.tolist() == [1] + [0] * 10 + [5, 6]
    assert labels.tolist() == [NO] * 10 + [5, 6, NO]  # the last image row predicts the text after it
    assert starts.tolist() == [1]


def test_a_label_on_the_first_token_trains_nothing() -> None:
    _, labels, _ = expand(np.array([4, 5]), np.array([4, 5]), [])
    assert labels.tolist() == [5, NO]


def test_expand_refuses_text_and_images_that_do_not_match() -> None:
    with pytest.raises(DataError, match="2 image placeholders and 1 images"):
        expand(np.array([IMG, IMG]), np.array([NO, NO]), [planner()(*WIDE)])


def test_a_pack_is_its_samples_end_to_end(dataset: ListDataset) -> None:
    batch = build(dataset, [2, 1, 0])
    lengths = [5 + 17 + 73, 3, 3 + 10]
    assert batch.cu_seqlens.tolist() == batch.cu_seqlens_padded.tolist() == [0, *np.cumsum(lengths)]
    assert batch.position_ids.tolist() == [p for length in lengths for p in range(length)]
    assert batch.tokens.tolist() == [1, 9, *[0] * 17, 10, *[0] * 73, 11, 2, 1, 7, 8, 1, *[0] * 10, 5, 6]
    first = [NO] * 18 + [10] + [NO] * 73 + [11, 2, NO]
    assert batch.labels.tolist() == [*first, 7, 8, NO, *[NO] * 10, 5, 6, NO]
    assert batch.image_starts.tolist() == [2, 20, 99]
    assert batch.image_grids.tolist() == [[8, 1], [8, 8], [1, 8]]
    assert batch.image_rows.tolist() == [17, 73, 10]
    assert batch.sample_ids.tolist() == [2, 1, 0]


def test_dtypes(dataset: ListDataset) -> None:
    for batch in (build(dataset, [0, 2]), build(dataset, [1]), build(dataset, [])):
        types = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        assert types.pop("codes") is None and types.pop("drawn").dtype == torch.bool
        del types["pixel_shapes"], types["damaged"]
        types |= types.pop("pixels")
        narrow = {"cu_seqlens": torch.int32, "cu_seqlens_padded": torch.int32, "patches": torch.uint8}
        assert "patches" in types and "teacher" not in types
        for name, tensor in types.items():
            assert tensor.dtype == narrow.get(name, torch.int64), name
            assert tensor.is_contiguous(), name


def test_pixels_are_the_images_in_order(dataset: ListDataset) -> None:
    batch = build(dataset, [2, 1, 0])
    assert batch.pixels["patches"].shape == (4 * (8 + 64 + 8), 588) == batch.pixel_shapes["patches"]
    assert batch.pixel_shapes["teacher"] == (3, 112, 112, 3)
    expected = [
        view_of(
            decode_image(dataset.image_bytes(image), apply_exif=False, max_pixels=10**6),
            dataset.image_plan(image).views["patches"],
        )
        for image in (1, 2, 0)
    ]
    assert (batch.pixels["patches"].numpy() == np.concatenate(expected)).all()


def test_without_pixels_everything_else_is_the_same(
    dataset: ListDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_pixels = build(dataset, [0, 2], tensor=2)
    monkeypatch.setattr(dataset, "image_bytes", None)  # reading a file would fail
    without = build(dataset, [0, 2], tensor=2, pixels=False)
    assert without.pixels == {} and without.pixel_shapes == with_pixels.pixel_shapes
    for field in dataclasses.fields(PackedBatch):
        if field.name not in ("pixels", "pixel_shapes", "damaged", "codes"):
            assert torch.equal(getattr(with_pixels, field.name), getattr(without, field.name)), field.name


def test_a_text_only_pack_has_no_rows_of_images(dataset: ListDataset) -> None:
    batch = build(dataset, [1, 1])
    assert batch.pixels["patches"].shape == (0, 588) == batch.pixel_shapes["patches"]
    assert batch.image_starts.shape == (0,) and batch.image_grids.shape == (0, 2)
    assert batch.image_rows.shape == (0,)


@pytest.mark.parametrize(
    ("tensor", "context", "rows", "sample_multiple", "pack_multiple"),
    [(1, 1, 16, 1, 16), (4, 1, 16, 1, 64), (2, 2, 16, 4, 64), (2, 3, 128, 6, 768)],
)
def test_a_pack_for_fp8_has_whole_blocks_on_every_rank(
    tensor: int, context: int, rows: int, sample_multiple: int, pack_multiple: int
) -> None:
    assert padding_multiples(tensor, context, rows) == (sample_multiple, pack_multiple)
    assert pack_multiple % (tensor * context * rows) == 0


@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("indices", [[0, 2, 1, 3], []], ids=["samples", "none"])
def test_padding_to_a_length_is_samples_of_their_own(
    dataset: ListDataset, tensor: int, context: int, indices: list[int]
) -> None:
    """Of no real token, cut as the layout wants, none of them long; the samples themselves stay as they are."""
    sizes = {"tensor_parallel": tensor, "context_parallel": context, "views": ["patches"]}
    plain = build_batch(dataset, indices, **sizes)
    batch = build_batch(dataset, indices, length=4 * 1536, **sizes)
    real, slots = batch.cu_seqlens.diff(), batch.cu_seqlens_padded.diff()
    assert len(batch.tokens) == len(batch.labels) == len(batch.position_ids) == int(slots.sum()) == 4 * 1536
    count = len(plain.sample_ids)
    assert torch.equal(batch.sample_ids[:count], plain.sample_ids)
    assert torch.equal(real[:count], plain.cu_seqlens.diff()) and (real[count:] == 0).all()
    assert (
        (batch.sample_ids[count:] == -1).all() and (slots[count:] > 0).all() and (slots[count:] <= 512).all()
    )
    assert (slots % (2 * context if context > 1 else 1) == 0).all()
    end = int(batch.cu_seqlens_padded[count])
    assert torch.equal(batch.tokens[:end], plain.tokens[:end]) and torch.equal(
        batch.labels[:end], plain.labels[:end]
    )
    assert (batch.tokens[end:] == 0).all() and (batch.labels[end:] == NO).all()
    assert torch.equal(batch.image_starts, plain.image_starts)
    starts = batch.cu_seqlens_padded[:-1].long()
    assert torch.equal(
        batch.position_ids, torch.arange(len(batch.tokens)) - starts.repeat_interleave(slots.long())
    )
    exact = build_batch(dataset, indices, length=-(-end // 1536) * 1536, **sizes)
    assert len(exact.tokens) == -(-end // 1536) * 1536


def test_a_length_that_samples_do_not_fit_into_is_refused(dataset: ListDataset) -> None:
    with pytest.raises(ValueError, match="cannot be made 2 long"):
        build_batch(dataset, [0], tensor_parallel=1, context_parallel=1, views=[], length=2)


@pytest.mark.parametrize(
    ("tensor", "context", "sample_multiple", "pack_multiple"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (8, 1, 1, 8), (1, 2, 4, 4), (2, 2, 4, 8), (4, 4, 8, 32)],
)
def test_padding_is_what_parallelism_asks_and_no_more(
    dataset: ListDataset, tensor: int, context: int, sample_multiple: int, pack_multiple: int
) -> None:
    plain = build(dataset, [0, 2, 1, 3])
    batch = build(dataset, [0, 2, 1, 3], tensor, context)
    real, slots = batch.cu_seqlens.diff(), batch.cu_seqlens_padded.diff()
    assert torch.equal(batch.cu_seqlens, plain.cu_seqlens)
    assert (slots % sample_multiple == 0)[:-1].all() and (
        slots % (2 * context if context > 1 else 1) == 0
    ).all()
    assert len(batch.tokens) == int(batch.cu_seqlens_padded[-1]) and len(batch.tokens) % pack_multiple == 0
    assert (slots - real >= 0).all() and (slots - real < sample_multiple)[:-1].all()
    assert len(batch.tokens) - int((-(-real // sample_multiple) * sample_multiple).sum()) < pack_multiple

    starts, old = batch.cu_seqlens_padded.tolist(), plain.cu_seqlens.tolist()
    for sample, length in enumerate(real.tolist()):
        new, was = starts[sample], old[sample]
        assert torch.equal(batch.tokens[new : new + length], plain.tokens[was : was + length])
        assert torch.equal(batch.labels[new : new + length], plain.labels[was : was + length])
        assert (batch.tokens[new + length : starts[sample + 1]] == 0).all()
        assert (batch.labels[new + length : starts[sample + 1]] == NO).all()
        slot = batch.position_ids[new : starts[sample + 1]]
        assert slot.tolist() == list(range(len(slot)))
    # The first image of sample 2 begins two rows into its slot, wherever that is.
    assert batch.image_starts.tolist() == [starts[0] + 1, starts[1] + 2, starts[1] + 20, starts[3]]


@pytest.mark.parametrize(("tensor", "context", "tokens"), [(1, 1, 1), (4, 1, 4), (2, 2, 8)])
def test_an_empty_pack_holds_one_padding_sample_without_label(
    dataset: ListDataset, tensor: int, context: int, tokens: int
) -> None:
    batch = build(dataset, [], tensor, context)
    assert batch.tokens.tolist() == [0] * tokens and batch.labels.tolist() == [NO] * tokens
    assert batch.cu_seqlens.tolist() == [0, 1] and batch.cu_seqlens_padded.tolist() == [0, tokens]
    assert batch.sample_ids.tolist() == [PADDING_SAMPLE_ID] and batch.pixel_shapes["patches"] == (0, 588)


def test_an_image_that_does_not_decode_becomes_a_placeholder(
    dataset: ListDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, the others stay as they are, and shapes do not change."""
    whole, original = build(dataset, [0, 2]), dataset.image_bytes
    monkeypatch.setattr(dataset, "image_bytes", lambda image: b"rot" if image == 1 else original(image))
    batch = build(dataset, [0, 2])
    assert list(batch.damaged) == [1] and "not JPEG" in batch.damaged[1] and whole.damaged == {}
    found, expected = batch.pixels["patches"], whole.pixels["patches"]
    assert found.shape == expected.shape
    first, last = 4 * 8, 4 * (8 + 8)  # patches of image 1
    assert torch.equal(found[:first], expected[:first])
    assert torch.equal(found[last:], expected[last:])
    colours = found[first:last].unflatten(1, (3, 196)).unique(dim=2).flatten().unique()
    assert colours.tolist() == [104, 116, 122]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_images_are_shared_out(dataset: ListDataset, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image once, in order, as the padded square; a rank reads no other file than those of its share."""
    read: list[int] = []
    original = dataset.image_bytes
    monkeypatch.setattr(dataset, "image_bytes", lambda image: read.append(image) or original(image))
    shares = [
        build_batch(
            dataset, [2, 1, 0], tensor_parallel=1, context_parallel=1, views=[], shared_views=["teacher"],
            share=ImageShare(rank, ranks),
        ).pixels["teacher"]
        for rank in range(ranks)
    ]  # fmt: skip
    assert read == [1, 2, 0]
    assert all(share.dtype == torch.uint8 for share in shares)
    squares = torch.cat(shares)
    for square, image in zip(squares, (1, 2, 0), strict=True):
        picture = decode_image(original(image), apply_exif=False, max_pixels=10**6)
        expected = view_of(picture, dataset.image_plan(image).views["teacher"])
        assert torch.equal(square, torch.from_numpy(expected))
    assert squares.shape == (3, 112, 112, 3)


def test_one_rank_decodes_an_image_once_for_both(
    dataset: ListDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = dataset.image_bytes
    monkeypatch.setattr(dataset, "image_bytes", lambda image: read.append(image) or original(image))
    dataset.planner = planner(teacher_patch_size=16)
    batch = build_batch(dataset, [0, 2], tensor_parallel=1, context_parallel=1, **ALL_VIEWS)
    assert len(read) == 3 and set(batch.pixels) == {"patches", "teacher"}
    assert batch.pixels["teacher"].shape == (3, 128, 128, 3)  # 8 x 8 patches of 16 pixels
    dataset.planner = planner()
    none = build_batch(dataset, [1], tensor_parallel=1, context_parallel=1, **ALL_VIEWS)
    assert none.pixels["teacher"].shape == (0, 112, 112, 3)
