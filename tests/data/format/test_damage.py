"""Files of a dataset damaged at random: a clear error or whole data, never a crash or a read out of bounds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.manifest import IMAGE_PARTS, MANIFEST, TEXT_PARTS
from megatron_eve.data.images import ImageError
from megatron_eve.data.images.decode import decode_image
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset
from megatron_eve.data.inspecting.inspection import write_inspection
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.runtime.errors import UserError
from tests.data.helpers import MINI_SETTINGS, encoded, picture

TEXTS = [[1, -200, 5, 6], [1, 7, 383], [1, -200, 8, -200, 9], [1, 4, 4, 4, 4]]
SIZES = [[(20, 10)], [], [(10, 30), (16, 16)], []]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("whole") / "set"
    with DatasetWriter(prefix, MINI_SETTINGS) as writer:
        for tokens, sizes in zip(TEXTS, SIZES, strict=True):
            images = [StoredImage(encoded(picture(*size), "PNG"), *size) for size in sizes]
            labels = [token if token > 1 else -100 for token in tokens]
            writer.add_sample(tokens, labels, images)
        writer.finalise()
    return prefix


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, str, int, bytes]:
    """A part, what happens to it, where (any number, taken modulo the size), and with which bytes."""
    part = draw(st.sampled_from([*TEXT_PARTS, *IMAGE_PARTS, MANIFEST]))
    kind = draw(st.sampled_from(["overwrite", "overwrite", "overwrite", "cut", "extend", "remove"]))
    return part, kind, draw(st.integers(0, 1 << 16)), draw(st.binary(min_size=1, max_size=16))


def inflict(prefix: Path, harm: tuple[str, str, int, bytes]) -> None:
    part, kind, where, data = harm
    path = Path(f"{prefix}{part}")
    if not path.exists():
        return
    content = path.read_bytes()
    at = where % max(len(content), 1)
    if kind == "remove":
        path.unlink()
    elif kind == "overwrite":
        path.write_bytes((content[:at] + data + content[at + len(data) :])[: len(content)])
    else:
        path.write_bytes(content[:at] if kind == "cut" else content + data)


def loader_of(dataset: IndexedVisionDataset) -> StepLoader:
    return StepLoader(
        dataset,
        lambda positions: positions,
        global_batch_size=1,
        seq_length=2048,
        data_parallel_rank=0,
        data_parallel_size=1,
        views=["patches"],
    )


def read_everything(prefix: Path, mmap: bool) -> int:
    """As a run does: open, check, read every sample and image; gives how many samples were refused."""
    dataset = IndexedVisionDataset(prefix, mmap_bin_files=mmap)
    dataset.check_compatible(
        tokenizer_sha256="ab" * 32,
        vocab_size=384,
        family="eve",
        image_settings={"image_size": 224, "teacher_size": 112},
    )
    assert len(dataset) == len(TEXTS)
    loader = loader_of(dataset)
    refused = 0
    for index in range(len(dataset)):
        try:
            (batch,) = loader.step_of(np.array([index])).batches
        except DataError as error:
            assert f"{prefix}" in str(error)
            refused += 1
            continue
        # What is not refused is of the shapes that were planned.
        assert int(batch.cu_seqlens[-1]) == dataset.lengths(np.array([index]))[0]
        assert batch.pixels["patches"].shape == batch.pixel_shapes["patches"]
        assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 384
    for image in range(len(dataset.images)):
        try:
            decode_image(dataset.image_bytes(image), apply_exif=False, max_pixels=1 << 20)
        except (DataError, ImageError) as error:
            assert str(error)
    loader.close()
    return refused


def test_undamaged_nothing_is_refused(prefix: Path) -> None:
    assert read_everything(prefix, True) == read_everything(prefix, False) == 0


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(harms=st.lists(damage(), min_size=1, max_size=3), mmap=st.booleans())
def test_damage_is_said_or_harmless(
    prefix: Path, harms: list[tuple[str, str, int, bytes]], mmap: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in prefix.parent.iterdir():
            shutil.copy(path, folder)
        for harm in harms:
            inflict(Path(folder) / "set", harm)
        try:
            read_everything(Path(folder) / "set", mmap)
        except UserError as error:  # a damaged name of a family is told as one that is not known
            assert f"{folder}/set" in str(error)  # the file is named


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(harms=st.lists(damage(), min_size=1, max_size=3))
def test_a_look_at_a_damaged_dataset_comes_to_its_end(
    prefix: Path, harms: list[tuple[str, str, int, bytes]]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "set"
        for path in prefix.parent.iterdir():
            shutil.copy(path, folder)
        for harm in harms:
            inflict(copy, harm)
        try:
            dataset = IndexedVisionDataset(copy)
        except UserError:
            return
        tally = CheckCounts()
        damages = list(check_dataset(dataset, tally, workers=2, advance=lambda num_bytes: None))
        assert tally.damaged == len(damages) and all(folder in str(damage) for damage in damages)
        assert write_inspection(
            dataset, "set", Path(folder) / "look", list(range(len(dataset))), None
        ).exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", 999, "record 2 of .*_samples.npy says 999 tokens and 2 labels where .* have"),
        ("labels", 0, "record 2 of .*_samples.npy says .* and 0 labels"),
        ("first_image", 2, r"record 2 of .*_samples.npy says images 2 \.\. 3 of 3"),
        ("first_image", -1, r"says images -1 \.\. 0 of 3"),
    ],
)
def test_records_that_are_not_so(prefix: Path, tmp_path: Path, field: str, value: int, message: str) -> None:
    for path in prefix.parent.iterdir():
        shutil.copy(path, tmp_path)
    samples = np.load(tmp_path / "set_samples.npy")
    samples[field][2] = value
    np.save(tmp_path / "set_samples.npy", samples)
    with pytest.raises(DataError, match=message):
        IndexedVisionDataset(tmp_path / "set").text(2)


@pytest.mark.parametrize(("field", "value"), [("length", 9999), ("length", 0), ("num_images", -1)])
def test_records_are_judged_before_they_are_packed(
    prefix: Path, tmp_path: Path, field: str, value: int
) -> None:
    for path in prefix.parent.iterdir():
        shutil.copy(path, tmp_path)
    samples = np.load(tmp_path / "set_samples.npy")
    samples[field][2] = value
    np.save(tmp_path / "set_samples.npy", samples)
    with pytest.raises(
        DataError, match=rf"row 2 of {tmp_path}/set has .* by its record, and a pack holds 2048"
    ):
        loader_of(IndexedVisionDataset(tmp_path / "set")).step_of(np.array([2]))
