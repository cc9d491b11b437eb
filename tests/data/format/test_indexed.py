"""The dataset on disk: what goes in comes out, and what is damaged or does not fit is refused by name."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format import megatron_index
from megatron_eve.data.format.indexed import DatasetSettings, DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.manifest import IMAGE_PARTS, TEXT_PARTS
from megatron_eve.data.format.sample_block import Sample, make_block
from tests.data.helpers import planner

SETTINGS = DatasetSettings(
    template="vicuna_v1",
    image_settings={"image_size": 672, "teacher_size": 336},
    family="eve",
    model_max_length=2048,
    apply_exif=True,
    max_pixels=1000,
    tokenizer_sha256="ab" * 32,
    vocab_size=384,
)
WIDE, TALL = StoredImage(b"wide bytes", 640, 427), StoredImage(b"tall\0bytes\xff", 427, 640)
SAMPLES: list[tuple[list[int], list[int], list[StoredImage]]] = [
    ([1, -200, 5, 6], [-100, -100, 5, 6], [WIDE]),
    ([1, 7, 383], [1, -100, 383], []),  # the label of the first position is never predicted
    ([1, -200, 8, -200, 0], [-100, -100, -100, -100, 0], [TALL, WIDE]),
]


def write(prefix: Path, samples: list[Any] = SAMPLES) -> Path:
    with DatasetWriter(prefix, SETTINGS) as writer:
        for tokens, labels, images in samples:
            writer.add_sample(tokens, labels, images)
        writer.finalise()
    return prefix


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


@pytest.mark.parametrize("mmap", [True, False])
def test_what_goes_in_comes_out(prefix: Path, mmap: bool) -> None:
    dataset = IndexedVisionDataset(prefix, mmap_bin_files=mmap)
    assert len(dataset) == 3
    wide, tall = (planner(672, 336)(i.width, i.height) for i in (WIDE, TALL))
    lengths = [3 + wide.rows, 3, 3 + tall.rows + wide.rows]
    found = dataset.lengths(np.array([[2, 0], [1, 1]]))
    assert found.dtype == np.int64
    assert found.tolist() == [[lengths[2], lengths[0]], [lengths[1]] * 2]
    for index, (tokens, labels, images) in enumerate(SAMPLES):
        found_tokens, found_labels = dataset.text(index)
        assert (found_tokens.dtype, found_labels.dtype) == (np.int64, np.int64)
        assert (found_tokens.tolist(), found_labels.tolist()) == (tokens, labels)
        record = dataset.samples[index]
        assert (record["length"], record["text_length"]) == (lengths[index], len(tokens))
        assert record["num_images"] == len(images)
        assert record["labels"] == sum(label != -100 for label in labels[1:])
        for offset, image in enumerate(images):
            row = int(record["first_image"]) + offset
            assert dataset.image_bytes(row) == image.data
            assert dataset.image_plan(row) == planner(672, 336)(image.width, image.height)
            assert dataset.images[row].tolist() == (image.width, image.height, len(image.data))


def test_the_manifest(prefix: Path) -> None:
    info = IndexedVisionDataset(prefix).info
    assert (info.num_samples, info.num_images, info.num_rows) == (3, 3, 3)
    assert (info.num_text_tokens, info.num_labels) == (12, 4)
    samples = IndexedVisionDataset(prefix).samples
    assert info.num_tokens == samples["length"].sum()
    assert (info.longest_sample, info.longest_length) == (2, samples["length"].max())
    assert info.text_bytes == 2 * 4 * 12 == Path(f"{prefix}_text.bin").stat().st_size
    assert info.image_bytes == sum(len(image.data) for image in (WIDE, TALL, WIDE))
    assert (info.template, info.apply_exif, info.max_pixels) == ("vicuna_v1", True, 1000)


def test_arrays_outlive_their_dataset(prefix: Path) -> None:
    dataset = IndexedVisionDataset(prefix)
    tokens, _ = dataset.text(2)
    data, samples, lengths = dataset.image_bytes(1), dataset.samples, dataset.lengths(np.arange(3))
    del dataset
    gc.collect()
    assert tokens.tolist() == SAMPLES[2][0]  # megatron-core's own arrays would end the process here
    assert (data, int(samples["num_images"].sum()), len(lengths)) == (TALL.data, 3, 3)


def test_megatron_reads_the_parts(prefix: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    text, image = IndexedDataset(f"{prefix}_text"), IndexedDataset(f"{prefix}_image")
    assert text.sequence_lengths.tolist() == [8, 6, 10]
    assert text[1].tolist() == [1, 7, 383, 1, -100, 383]
    assert image[0].tobytes() == WIDE.data
    assert text.document_indices.tolist() == [0, 3]


def test_a_dataset_without_images_has_no_image_parts(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set")
    write(prefix, SAMPLES[1:2])  # in place of one with images
    assert not any(Path(f"{prefix}{part}").exists() for part in IMAGE_PARTS)
    dataset = IndexedVisionDataset(prefix)
    assert (len(dataset), len(dataset.images), dataset.info.image_bytes) == (1, 0, 0)
    assert dataset.text(0)[0].tolist() == [1, 7, 383]
    with pytest.raises(IndexError):
        dataset.image_bytes(0)


@pytest.mark.parametrize("index", [-1, 3])
def test_rows_that_do_not_exist(prefix: Path, index: int) -> None:
    dataset = IndexedVisionDataset(prefix)
    for read in (dataset.text, dataset.image_bytes, dataset.image_plan):
        with pytest.raises(IndexError, match=str(index)):
            read(index)


def test_a_writer_that_stops_leaves_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power"), DatasetWriter(tmp_path / "new", SETTINGS) as writer:
        writer.add_sample(*SAMPLES[0])
        raise RuntimeError("power")
    assert list(tmp_path.iterdir()) == []
    prefix = write(tmp_path / "set", SAMPLES[:1])
    with pytest.raises(RuntimeError), DatasetWriter(prefix, SETTINGS) as writer:
        writer.add_sample(*SAMPLES[1])
        raise RuntimeError
    assert IndexedVisionDataset(prefix).text(0)[0].tolist() == SAMPLES[0][0]


def test_a_writer_that_is_killed_leaves_nothing_that_opens(tmp_path: Path) -> None:
    writer = DatasetWriter(tmp_path / "set", SETTINGS)
    writer.add_sample(*SAMPLES[0])
    with pytest.raises(DataError, match=r"set_dataset\.json is missing.*preprocessing did not finish"):
        IndexedVisionDataset(tmp_path / "set")
    writer._lock.release()  # as the kernel does
    write(tmp_path / "set")  # and its leavings are no obstacle
    assert len(IndexedVisionDataset(tmp_path / "set")) == 3
    assert not list(tmp_path.glob("*.partial"))


def test_killed_between_the_parts_and_the_manifest(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_eve.data.format import indexed_writer

    publish = indexed_writer.publish
    for number in range(6):
        left = number

        def some(path: str) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            publish(path)

        monkeypatch.setattr(indexed_writer, "publish", some)
        with pytest.raises(KeyboardInterrupt):
            write(prefix, SAMPLES[:2])
        with pytest.raises(DataError):  # neither the old nor half of the new
            IndexedVisionDataset(prefix)


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"), DatasetWriter(tmp_path / "set", SETTINGS) as writer:
        writer.finalise()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokens", "labels", "images", "message"),
    [
        ([1, 384], [-100, 384], [], "token id 384 is out of range"),
        ([1, -1], [-100, -100], [], "token id -1 is out of range"),
        ([1, 2**40], [-100, -100], [], "out of range"),
        ([1, 5], [-100, 6], [], "a label is neither"),
        ([1, -200], [-100, -200], [WIDE], "a label is neither"),
        ([1, 5], [-100], [], "2 tokens and 1 labels"),
        ([], [], [], "0 tokens"),
        ([1, -200, 5], [-100, -100, 5], [], "1 image placeholders for 0 images"),
        ([1, 5], [-100, 5], [WIDE], "0 image placeholders for 1 images"),
    ],
)
def test_samples_that_are_not_whole(
    tmp_path: Path, tokens: list[int], labels: list[int], images: list[StoredImage], message: str
) -> None:
    with DatasetWriter(tmp_path / "set", SETTINGS) as writer:
        writer.add_sample(*SAMPLES[0])
        with pytest.raises(DataError, match=f"sample 1 .*{message}"):
            writer.add_sample(tokens, labels, images)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_the_index_is_what_megatron_writes(
    tmp_path: Path, dtype: type[np.generic], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    lengths = np.random.default_rng(0).integers(0, 2**20, 1000)
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.sequence_lengths = lengths.tolist()
    builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    monkeypatch.setattr(megatron_index, "_ROWS_AT_A_TIME", 64)
    writer = megatron_index.IndexWriter(str(tmp_path / "ours.idx"), np.dtype(dtype))
    for part in np.split(lengths, [1, 1, 500]):
        writer.add(part)
    writer.close()
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_images_that_a_process_did_not_write_are_missed(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "set", SETTINGS) as writer:
        writer.add_sample(*SAMPLES[0])
        offset = writer.add_block(make_block([Sample(*SAMPLES[2])], SETTINGS))
        assert offset == len(WIDE.data)
        with pytest.raises(DataError, match=r"set_image\.bin\.partial has 10 bytes where 31 are due"):
            writer.finalise()


def truncate(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def overwrite(path: Path, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def edit_manifest(prefix: Path, **changes: Any) -> None:
    path = Path(f"{prefix}_dataset.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(prefix: Path) -> str:
    with pytest.raises(DataError) as error:
        IndexedVisionDataset(prefix)
    assert "tools/preprocess_data.py" in str(error.value) or "run it again" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("part", [*TEXT_PARTS, *IMAGE_PARTS, "_dataset.json"])
def test_every_part_is_missed(prefix: Path, part: str) -> None:
    Path(f"{prefix}{part}").unlink()
    assert f"set{part} is missing" in refusal(prefix)


@pytest.mark.parametrize("part", [*TEXT_PARTS, *IMAGE_PARTS])
@pytest.mark.parametrize("by", [1, 8, None])
def test_every_part_is_missed_when_truncated(prefix: Path, part: str, by: int | None) -> None:
    path = Path(f"{prefix}{part}")
    truncate(path, path.stat().st_size if by is None else by)
    message = refusal(prefix)
    assert f"set{part} " in message
    assert "truncated" in message


@pytest.mark.parametrize("part", ["_text.bin", "_text.idx", "_image.bin"])
def test_a_part_that_is_too_long(prefix: Path, part: str) -> None:
    path = Path(f"{prefix}{part}")
    path.write_bytes(path.read_bytes() + b"\0" * 4)
    assert f"set{part} is too long" in refusal(prefix)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (9, b"\x02", "is of version 2, and version 1 can be read"),
        (0, b"XXIDIDX", "is not a Megatron index file"),
        (17, b"\x01", "is for data of type code 1, not int32"),
        (17, b"\x63", "is for data of type code 99"),
        (18, b"\x02", "has 2 rows where the manifest says 3"),
    ],
)
def test_another_index(prefix: Path, at: int, data: bytes, message: str) -> None:
    overwrite(Path(f"{prefix}_text.idx"), at, data)
    found = refusal(prefix)
    assert "set_text.idx" in found
    assert message in found


@pytest.mark.parametrize(
    "changes",
    [{"num_samples": 2}, {"num_samples": 4}, {"num_images": 2}, {"text_bytes": 4}, {"image_bytes": 5}],
)
def test_counts_that_do_not_match_the_manifest(prefix: Path, changes: dict[str, int]) -> None:
    edit_manifest(prefix, **changes)
    refusal(prefix)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "format version None"),
        (
            '{"format_version": 5}',
            "format version 5 and this code reads versions 1 to 4: make the dataset again",
        ),
        ('{"format_version": 4}', "is not a manifest this version wrote"),
        ('{"format_version": 3}', "is not a manifest this version wrote"),
        ('{"format_version": 2}', "is not a manifest this version wrote"),
    ],
)
def test_manifests_that_are_none(prefix: Path, content: str, message: str) -> None:
    Path(f"{prefix}_dataset.json").write_text(content)
    found = refusal(prefix)
    assert "set_dataset.json" in found
    assert message in found


def test_parts_of_two_datasets(prefix: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", SAMPLES[:2])
    shutil.copy(f"{other}_samples.npy", f"{prefix}_samples.npy")
    assert "set_samples.npy holds (2,) records" in refusal(prefix)
    np.save(f"{prefix}_samples.npy", np.zeros(3))
    assert "set_samples.npy holds (3,) records of float64" in refusal(prefix)


@pytest.mark.parametrize(
    ("position", "token", "message"),
    [
        (1, 384, "token id 384 is out of range for a vocabulary of 384"),
        (1, -7, "token id -7 is out of range"),
        (1, 2**31 - 1, "out of range"),
        (4, 9, "a label is neither"),
        (1, -200, "1 image placeholders for 0 images"),
    ],
)
def test_damaged_rows_are_named(prefix: Path, position: int, token: int, message: str) -> None:
    first = 8  # values of row 0
    overwrite(Path(f"{prefix}_text.bin"), 4 * (first + position), np.int32(token).tobytes())
    dataset = IndexedVisionDataset(prefix)
    assert dataset.text(0)[0].tolist() == SAMPLES[0][0]
    with pytest.raises(DataError, match=f"row 1 of .*set_text.bin: .*{message}") as error:
        dataset.text(1)
    assert "tools/preprocess_data.py" in str(error.value)


@pytest.mark.parametrize("mmap", [True, False])
def test_damaged_row_tables_are_named(prefix: Path, mmap: bool) -> None:
    overwrite(Path(f"{prefix}_text.idx"), 34 + 4, np.int32(12).tobytes())  # length of row 1
    overwrite(Path(f"{prefix}_image.idx"), 34 + 3 * 4 + 8, np.int64(10**6).tobytes())  # offset of row 1
    dataset = IndexedVisionDataset(prefix, mmap_bin_files=mmap)
    with pytest.raises(DataError, match=r"row 1 of .*set_text\.idx has 12 values"):
        dataset.text(1)
    with pytest.raises(DataError, match=r"row 1 of .*set_image\.idx has 11 values at byte 1000000"):
        dataset.image_bytes(1)
    assert dataset.image_bytes(0) == WIDE.data


COMPATIBLE: dict[str, Any] = {
    "tokenizer_sha256": "ab" * 32,
    "vocab_size": 384,
    "family": "eve",
    "image_settings": {"image_size": 672, "teacher_size": 336},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_sha256": "cd" * 32}, "another tokenizer .*--tokenizer-model"),
        (
            {"vocab_size": 32000},
            "a tokenizer of 384 pieces, and the run's vocabulary has 32000: give --vocab-size 384",
        ),
        ({"family": "toy"}, "the family eve and the run has toy: give --family eve, .* with --family toy"),
        ({"vocab_size": 449}, r"384 pieces, and .* 449: give .*resize_token_embeddings\(384\)"),
        ({"vocab_size": 383}, "384 pieces, and .* 383: give --vocab-size 384, or preprocess .*tokenizer$"),
        (
            {"image_settings": {"image_size": 1344}},
            "image size 672 and the run has 1344: .*--image-size 672.*--image-size 1344",
        ),
        (
            {"image_settings": {"image_size": 672, "teacher_size": 112}},
            "teacher size 336 and the run has 112.*--teacher-size 336",
        ),
    ],
)
def test_a_run_that_does_not_fit(prefix: Path, change: dict[str, Any], message: str) -> None:
    dataset = IndexedVisionDataset(prefix)
    with pytest.raises(DataError, match=rf"set_dataset\.json.*{message}"):
        dataset.check_compatible(**COMPATIBLE | change)


def test_a_run_that_fits(prefix: Path) -> None:
    dataset = IndexedVisionDataset(prefix)
    dataset.check_compatible(**COMPATIBLE)
    dataset.check_compatible(**COMPATIBLE | {"tokenizer_sha256": None})
    for rows in (385, 448):  # an embedding with rows that no piece has
        dataset.check_compatible(**COMPATIBLE | {"vocab_size": rows})


def test_text_alone_fits_any_image_size(tmp_path: Path) -> None:
    """It has no pictures that an image size could be about; its vocabulary still matters."""
    dataset = IndexedVisionDataset(write(tmp_path / "set", [([1, 5], [-100, 5], [])]))
    dataset.check_compatible(
        **COMPATIBLE | {"family": "toy", "image_settings": {"image_size": 1344, "teacher_size": 112}}
    )
    with pytest.raises(DataError, match="vocabulary"):
        dataset.check_compatible(**COMPATIBLE | {"vocab_size": 32000})


def test_many_rows(tmp_path: Path) -> None:
    count = 3000
    samples = [([1] * (1 + n % 7), [1] * (1 + n % 7), []) for n in range(count)]
    dataset = IndexedVisionDataset(write(tmp_path / "set", samples))
    assert dataset.lengths(np.arange(count)).tolist() == [1 + n % 7 for n in range(count)]
    for row in (0, 1, 1499, 2999):
        assert len(dataset.text(row)[0]) == 1 + row % 7


def test_the_digest_of_the_content_follows_its_order(tmp_path: Path) -> None:
    """Two datasets of the same samples in another order have the same counts, and another digest."""
    samples = [([5, 6, 7], [5, 6, 7]), ([8, 9, 10], [8, 9, 10])]
    found = []
    for name, order in (("a", samples), ("b", samples), ("c", samples[::-1])):
        with DatasetWriter(tmp_path / name, SETTINGS) as writer:
            for tokens, labels in order:
                writer.add_sample(tokens, labels, [])
            found.append(writer.finalise())
    assert found[0].content_sha256 == found[1].content_sha256 != found[2].content_sha256
    assert found[0].num_tokens == found[2].num_tokens
