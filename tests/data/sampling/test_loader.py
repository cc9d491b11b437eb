from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data import batch as batch_module
from megatron_eve.data.batch import PADDING_SAMPLE_ID, PackedBatch
from megatron_eve.data.errors import DataError
from megatron_eve.data.mock import MockDataset
from megatron_eve.data.sampling.loader import Step, StepLoader
from megatron_eve.data.sampling.orders import DatasetSlice, ShuffledOrder
from megatron_eve.data.sampling.permutation import sample_order
from megatron_eve.data.text.conversation import IGNORE_INDEX
from tests.data.helpers import planner

SEQ_LENGTH = 512


@pytest.fixture(scope="module")
def dataset() -> MockDataset:
    return MockDataset(40, vocab_size=300, planner=planner(), seq_length=SEQ_LENGTH, seed=5)


def make(dataset: MockDataset, rank: int = 0, ranks: int = 1, **options: Any) -> StepLoader:
    settings: dict[str, Any] = {"global_batch_size": 12, "seq_length": SEQ_LENGTH, "views": []}
    part = DatasetSlice("mock", 0, len(dataset), 0, len(dataset))
    order = ShuffledOrder([part], options.pop("seed", 3), options.pop("shuffle", True))
    return StepLoader(
        dataset, order, data_parallel_rank=rank, data_parallel_size=ranks, **(settings | options)
    )


def samples_of(batches: Any) -> list[int]:
    return [index for batch in batches for index in batch.sample_ids.tolist() if index != PADDING_SAMPLE_ID]


def assert_equal_batches(left: PackedBatch, right: PackedBatch) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("pack_multiple", [1, 2])
def test_the_ranks_share_the_samples_of_the_step(
    dataset: MockDataset, ranks: int, pack_multiple: int
) -> None:
    steps = [make(dataset, rank, ranks, pack_multiple=pack_multiple).step(24, 12) for rank in range(ranks)]
    expected = sample_order(np.arange(24, 36), len(dataset), 3)
    seen = [index for step in steps for index in samples_of(step.batches)]
    assert sorted(seen) == sorted(expected.tolist())
    labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for step in steps for batch in step.batches)
    images = sum(len(batch.image_grids) for step in steps for batch in step.batches)
    tokens = sum(int(batch.cu_seqlens[-1]) for step in steps for batch in step.batches)
    padding = sum(
        int((batch.sample_ids == PADDING_SAMPLE_ID).sum()) for step in steps for batch in step.batches
    )
    packs = sum(step.num_microbatches for step in steps)
    for step in steps:
        assert step.sample_ids.tolist() == expected.tolist()
        assert (step.num_labels, step.num_images, step.num_tokens) == (labels, images, tokens - padding)
        assert step.num_microbatches == len(step.batches) == packs // ranks
        assert step.num_microbatches % pack_multiple == 0
        assert step.capacity_fraction == pytest.approx(step.num_tokens / (packs * SEQ_LENGTH))


def test_the_totals_need_no_text_and_no_image(dataset: MockDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(dataset, "text", refuse)
    monkeypatch.setattr(dataset, "image_bytes", refuse)
    step = make(dataset).step(0, 12)
    assert step.num_labels and step.num_images and step.num_tokens


def test_the_samples_do_not_depend_on_the_layout(dataset: MockDataset) -> None:
    layouts: list[dict[str, Any]] = [
        {},
        {"tensor_parallel": 4},
        {"context_parallel": 2, "tensor_parallel": 2},
        {"pack_multiple": 4},
        {"seq_length": 1024},
    ]
    steps = [make(dataset, **layout).step(36, 12) for layout in layouts]
    for step in steps:
        assert step.sample_ids.tolist() == steps[0].sample_ids.tolist()
        assert sorted(samples_of(step.batches)) == sorted(step.sample_ids.tolist())
        totals = (step.num_labels, step.num_images, step.num_tokens)
        assert totals == (steps[0].num_labels, steps[0].num_images, steps[0].num_tokens)


def test_no_pack_exceeds_the_sequence_length(dataset: MockDataset) -> None:
    for layout in (
        {"tensor_parallel": 8},
        {"context_parallel": 4},
        {"context_parallel": 2, "tensor_parallel": 2},
    ):
        for consumed in range(0, 40, 12):
            for batch in make(dataset, **layout).step(consumed).batches:
                assert len(batch.tokens) <= SEQ_LENGTH


def test_any_step_can_be_had_at_once(dataset: MockDataset) -> None:
    """Resuming needs the number of consumed samples and nothing else, prefetched or not."""
    walked = make(dataset)
    for number in range(4):
        step = walked.step(12 * number, 12)
        fresh = make(dataset).step(12 * number, 12)
        assert step.sample_ids.tolist() == fresh.sample_ids.tolist()
        for left, right in zip(step.batches, fresh.batches, strict=True):
            assert_equal_batches(left, right)


def test_epochs_are_joined_and_the_last_step_may_be_short(dataset: MockDataset) -> None:
    loader = make(dataset)
    ids = np.concatenate([loader.step(consumed, 12).sample_ids for consumed in range(0, 72, 12)])
    ids = np.append(ids, loader.step(72, 8).sample_ids)
    assert sorted(ids[:40].tolist()) == sorted(ids[40:].tolist()) == list(range(40))
    assert make(dataset, shuffle=False).step(36, 8).sample_ids.tolist() == [36, 37, 38, 39, 0, 1, 2, 3]


def test_more_packs_than_samples(dataset: MockDataset) -> None:
    steps = [make(dataset, rank, 4).step(0, 3) for rank in range(4)]
    assert [step.num_microbatches for step in steps] == [1, 1, 1, 1]
    assert sum(samples_of(step.batches) == [] for step in steps) == 1
    assert steps[3].batches[0].labels.tolist() == [IGNORE_INDEX]


def test_batches_can_be_iterated_in_turns_and_are_built_once(
    dataset: MockDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interleaved schedule goes through the microbatches once for each model chunk."""
    decoded: list[int] = []
    original = dataset.image_bytes

    def record(image: int) -> bytes:
        decoded.append(image)
        return original(image)

    monkeypatch.setattr(dataset, "image_bytes", record)
    loader = make(dataset, views=["patches"], pack_multiple=2, global_batch_size=20)
    step = loader.step(0)
    assert step.num_microbatches >= 4
    chunks = [iter(step.batches), iter(step.batches)]
    taken: list[list[PackedBatch]] = [[], []]
    for _ in range(0, step.num_microbatches, 2):
        for chunk, target in zip(chunks, taken, strict=True):
            target += [next(chunk) for _ in range(2)]
    assert all(left is right for left, right in zip(*taken, strict=True))
    loader.close()  # what was begun for the next step, which has other samples, is finished or dropped
    rows = dataset.samples[step.sample_ids]
    images = rows["first_image"][rows["num_images"] == 1].tolist()
    assert len(images) == step.num_images
    assert [decoded.count(image) for image in images] == [1] * len(images)


def test_batches_are_a_sequence(dataset: MockDataset) -> None:
    step = make(dataset).step(0)
    assert step.batches[-1] is step.batches[len(step.batches) - 1]
    assert [batch.sample_ids.tolist() for batch in step.batches[1:]] == [
        batch.sample_ids.tolist() for batch in list(step.batches)[1:]
    ]
    with pytest.raises(IndexError):
        step.batches[len(step.batches)]


def test_building_runs_ahead_but_not_far(dataset: MockDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[list[int]] = []
    original = batch_module.build_batch

    def record(dataset: MockDataset, indices: list[int], **options: Any) -> PackedBatch:
        built.append(list(indices))
        return original(dataset, indices, **options)

    monkeypatch.setattr("megatron_eve.data.sampling.loader.build_batch", record)
    loader = make(dataset, global_batch_size=40)
    step = loader.step(0)
    assert step.num_microbatches > 5 and built == []
    _ = step.batches[0]
    loader._executor.submit(lambda: None).result()  # whatever was queued has run
    assert len(built) == 3


@pytest.mark.timeout(60)
def test_an_error_reaches_the_one_who_asks_and_does_not_hang(
    dataset: MockDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, bad = dataset.text, int(make(dataset).step(0).sample_ids[5])

    def broken(index: int) -> Any:
        if index == bad:
            raise OSError(f"row {index} is gone")
        return original(index)

    monkeypatch.setattr(dataset, "text", broken)
    loader = make(dataset)
    step = loader.step(0, 12)
    outcomes = []
    for number in range(step.num_microbatches):
        try:
            outcomes.append(bad in step.batches[number].sample_ids)
        except OSError as error:
            assert str(bad) in str(error)
            outcomes.append(True)
            with pytest.raises(OSError, match="is gone"):  # again, for the next model chunk
                _ = step.batches[number]
    assert sum(outcomes) == 1
    loader.close()
    assert not any(thread.is_alive() for thread in loader._executor._threads)


def test_an_error_belongs_to_the_step_that_uses_the_sample(
    dataset: MockDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing the next step costs this one nothing; and a last step goes well, whatever lies behind it."""
    loader = make(dataset)
    bad = int(loader.step(12).sample_ids[5])
    lengths, text = dataset.lengths, dataset.text

    def too_long(ids: Any) -> Any:
        return np.where(ids == bad, SEQ_LENGTH + 1, lengths(ids))

    monkeypatch.setattr(dataset, "lengths", too_long)
    assert len(samples_of(loader.step(0).batches)) == 12
    with pytest.raises(DataError, match="raise --seq-length"):
        loader.step(12)
    monkeypatch.setattr(dataset, "lengths", lengths)

    def broken(index: int) -> Any:
        if index == bad:
            raise OSError(f"row {index} is gone")
        return text(index)

    monkeypatch.setattr(dataset, "text", broken)
    assert len(samples_of(loader.step(0).batches)) == 12
    with pytest.raises(OSError, match="is gone"):
        samples_of(loader.step(12).batches)
    loader.close()


def test_with_pixels(dataset: MockDataset) -> None:
    for batch in make(dataset, views=["patches"]).step(0).batches:
        assert batch.pixels["patches"].shape == batch.pixel_shapes["patches"]
    assert all(batch.pixels == {} for batch in make(dataset).step(0).batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 0}, "--global-batch-size is 0"),
        ({"seq_length": 510, "tensor_parallel": 4}, "--seq-length is 510.*multiple of 4"),
        ({"seq_length": 508, "tensor_parallel": 2, "context_parallel": 2}, "multiple of 8"),
        ({"rank": 2, "ranks": 2}, "rank 2 is not below the size 2"),
    ],
)
def test_bad_settings(dataset: MockDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(dataset, **options)


@pytest.mark.parametrize("ranks", [1, 3])
def test_packs_of_one_length(dataset: MockDataset, ranks: int) -> None:
    """On all ranks, known from the step alone, an empty pack included; samples and labels are those without."""
    loaders = [
        make(dataset, rank, ranks, seq_length=1024, fixed_length="step", tensor_parallel=2)
        for rank in range(ranks)
    ]
    plain = [make(dataset, rank, ranks, seq_length=1024, tensor_parallel=2) for rank in range(ranks)]
    for consumed, count in ((0, 12), (12, 2)):
        steps = [loader.step(consumed, count) for loader in loaders]
        others = [loader.step(consumed, count) for loader in plain]
        (length,) = {step.pack_length for step in steps}
        assert length is not None and length % 256 == 0 and length <= 1024
        longest = max(len(batch.tokens) for step in others for batch in step.batches)
        assert length - 256 < longest <= length
        for step, other in zip(steps, others, strict=True):
            assert other.pack_length is None
            assert {len(batch.tokens) for batch in step.batches} == {length}
            assert samples_of(step.batches) == samples_of(other.batches)
            assert step.num_labels == other.num_labels
            for padded, batch in zip(step.batches, other.batches, strict=True):
                assert torch.equal(
                    padded.labels[padded.labels != IGNORE_INDEX], batch.labels[batch.labels != IGNORE_INDEX]
                )


def test_packs_of_the_greatest_length(dataset: MockDataset) -> None:
    loader = make(dataset, seq_length=1024, fixed_length="seq_length")
    for step in (loader.step(0, 12), loader.step(12, 1)):
        assert step.pack_length == 1024
        assert {len(batch.tokens) for batch in step.batches} == {1024}


def test_pixels_are_taken_to_where_they_are_used(dataset: MockDataset) -> None:
    seen: list[torch.Size] = []

    def upload(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels.shape)
        return pixels + 1

    plain = make(dataset, views=["patches"]).step(0).batches[0]
    moved = make(dataset, views=["patches"], upload=upload).step(0).batches[0]
    patches = plain.pixels["patches"]
    assert torch.equal(moved.pixels["patches"], patches + 1) and patches.shape in seen
    assert torch.equal(moved.tokens, plain.tokens)
    without = make(dataset, upload=upload).step(0).batches[0]
    assert without.pixels == {}


@pytest.mark.parametrize(("consumed", "count"), [(-1, 4), (0, 0), (0, 13)])
def test_bad_steps(dataset: MockDataset, consumed: int, count: int) -> None:
    with pytest.raises(ValueError, match="no step takes"):
        make(dataset).step(consumed, count)


def test_a_sample_longer_than_a_pack_is_refused(dataset: MockDataset) -> None:
    longest = int(dataset.samples["length"].max())
    with pytest.raises(ValueError, match="--seq-length"):
        make(dataset, seq_length=longest - 1, global_batch_size=40).step(0)


def test_mock_data_is_deterministic_and_consistent(dataset: MockDataset) -> None:
    same = MockDataset(40, vocab_size=300, planner=planner(), seq_length=SEQ_LENGTH, seed=5)
    other = MockDataset(40, vocab_size=300, planner=planner(), seq_length=SEQ_LENGTH, seed=6)
    assert (same.samples == dataset.samples).all() and not (other.samples == dataset.samples).all()
    assert same.image_bytes(3) == dataset.image_bytes(3) != dataset.image_bytes(4)
    assert 0 < (dataset.samples["num_images"] == 0).sum() < 10
    for index in range(len(dataset)):
        tokens, labels = dataset.text(index)
        sample = dataset.samples[index]
        assert len(tokens) == len(labels) == sample["text_length"]
        assert (labels[1:] != IGNORE_INDEX).sum() == sample["labels"]
        assert tokens.max() < 300 and (tokens == same.text(index)[0]).all()
    loader = make(dataset, views=["patches"], global_batch_size=40)
    step: Step = loader.step(0)
    assert sum(int(batch.cu_seqlens[-1]) for batch in step.batches) == int(dataset.samples["length"].sum())


def test_mock_data_without_room_for_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="--seq-length 81 or more for its pictures"):
        MockDataset(4, vocab_size=300, planner=planner(), seq_length=80, seed=0)
