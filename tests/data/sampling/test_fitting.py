"""Samples that no pack of a run can hold are left out of its order, and the rest stays as it was."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_eve.checkpoint.compatibility import CheckpointError, check_data
from megatron_eve.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter, StoredImage
from megatron_eve.data.sampling.orders import split_dataset
from megatron_eve.data.sampling.permutation import inverse_sample_order, sample_order
from megatron_eve.models.registry import image_planner
from megatron_eve.training.loop.data import RunData, open_data
from tests.data.helpers import MINI_SETTINGS, encoded, picture

IMAGES = [1, 0, 6, 1, 0, 2, 0]  # of each row
WORDS = [5, 9, 3, 70, 300, 5, 20]  # tokens of text of each row


def write(prefix: Path, images: list[int] = IMAGES, words: list[int] = WORDS) -> str:
    photo = StoredImage(encoded(picture(280, 28), "PNG"), 280, 28)
    with DatasetWriter(prefix, MINI_SETTINGS) as writer:
        for count, length in zip(images, words, strict=True):
            text = (np.arange(length) % 300 + 3).tolist()
            tokens = [1, *[-200] * count, *text]
            writer.add_sample(tokens, [-100] * (1 + count) + text, [photo] * count)
        writer.finalise()
    return str(prefix)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("fitting") / "set")


def config_of(*prefixes: str, positions: int = 2048, **data: Any) -> RunConfig:
    return RunConfig(
        model=replace(ModelConfig(), max_position_embeddings=positions),
        training=TrainingConfig(global_batch_size=2, train_iters=1),
        data=DataConfig(**{"data_path": prefixes, **data}),
    )


def trained(data: RunData) -> list[int]:
    """The samples of the first epoch, sorted."""
    return sorted(data.order(np.arange(sum(map(len, data.training)))).tolist())


@given(size=st.integers(1, 5000), seed=st.integers(0, 1 << 70))
def test_places_are_the_inverse_of_the_order(size: int, seed: int) -> None:
    samples = sample_order(np.arange(size), size, seed)
    assert inverse_sample_order(samples, size, seed).tolist() == list(range(size))


@given(
    size=st.integers(1, 200),
    held_out=st.sampled_from([0.0, 0.2, 1.0]),
    rows=st.sets(st.integers(0, 199)),
)
def test_a_part_without_some_rows_keeps_the_order_of_the_others(
    size: int, held_out: float, rows: set[int]
) -> None:
    rows = {row for row in rows if row < size}
    for part in split_dataset("set", 1000, size, held_out):
        left = part.without(np.array(sorted(rows), dtype=np.int64))
        whole = part.samples(np.arange(len(part))).tolist()
        expected = [sample for sample in whole if sample - 1000 not in rows]
        assert len(left) == len(expected)
        assert left.samples(np.arange(len(left))).tolist() == expected
        assert bool(left.dropped_fingerprint()) == (len(expected) < len(whole))


def test_where_all_fit_nothing_changes(prefix: str) -> None:
    data = open_data(config_of(prefix, max_images_per_pack=6))
    assert data.dropped == ()
    assert data.fingerprint["dropped samples"] == []
    assert (data.fingerprint["templates"], data.fingerprint["apply_exif"]) == (["plain"], False)
    order = sample_order(np.arange(30), 7, TrainingConfig().seed)
    assert data.order(np.arange(30)).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("settings", "left", "message"),
    [
        (
            {"max_images_per_pack": 3},
            [0, 1, 3, 4, 5, 6],
            r"1 of 7 samples .* row 2 of .*set \(\d+ tokens, 6 images\); 1 with more images than "
            r"--max-images-per-pack 3 \(raise it to 6 or more\)$",
        ),
        (
            {"seq_length": 64},
            [0, 1, 2, 5, 6],
            r"2 of 7 samples .* row 3 of .*set \(.*, 1 images\), row 4 of .*set \(301 tokens, 0 images\); 2 longer "
            r"than --seq-length 64 \(raise it to 301 or more\)$",
        ),
        (
            {"seq_length": 256},  # of text alone: only here a smaller --model-max-length helps
            [0, 1, 2, 3, 5, 6],
            r"row 4 .*; 1 longer than --seq-length 256 \(raise it to 301 or more, or preprocess with "
            r"--model-max-length 256\)$",
        ),
        (
            {"positions": 100, "max_images_per_pack": 1},
            [0, 1, 3, 6],
            r"3 of 7 samples .*; 1 longer than the model's --max-position-embeddings 100 \(use a model with 301 or "
            r"more\); 2 with more images than --max-images-per-pack 1 \(raise it to 6 or more\)$",
        ),
    ],
)
def test_what_does_not_fit_is_left_out_and_named(
    prefix: str, settings: dict[str, Any], left: list[int], message: str
) -> None:
    data = open_data(config_of(prefix, **settings))
    assert trained(data) == left
    (sentence,) = data.dropped
    assert re.search(message, sentence), sentence
    grouped = open_data(config_of(prefix, group_by_modality=True, **settings))
    assert trained(grouped) == left


def test_among_several_datasets_and_held_out(prefix: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [0, 2, 0, 1], [5, 5, 600, 5])
    data = open_data(config_of(prefix, other, seq_length=512, max_images_per_pack=2))
    assert trained(data) == [0, 1, 3, 4, 5, 6, 7, 8, 10]
    assert len(data.dropped) == 2
    measured = open_data(config_of(prefix, seq_length=512, valid_data_path=(other,)))
    (part,) = measured.held_out
    assert part.samples(np.arange(len(part))).tolist() == [7, 8, 10]
    # A split holds out the same samples, whatever fits.
    split = {"split": "50,50", "seq_length": 512}
    few, all_ = (
        open_data(config_of(prefix, max_images_per_pack=3, **split)),
        open_data(config_of(prefix, **split)),
    )
    for less, whole in ((few.training, all_.training), (few.held_out, all_.held_out)):
        expected = [sample for sample in whole[0].samples(np.arange(len(whole[0]))).tolist() if sample != 2]
        assert less[0].samples(np.arange(len(less[0]))).tolist() == expected


def test_a_dataset_of_which_nothing_fits_is_refused(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"nothing is left of .*set to train on.*--seq-length 4 \(raise it"
    ) as error:
        open_data(config_of(prefix, seq_length=4))
    assert "model-max-length" not in str(error.value)  # which does not shorten an image
    album = write(tmp_path / "album", [4], [5])
    with pytest.raises(DataError, match=r"nothing is left of .*album .*--max-images-per-pack 3"):
        open_data(config_of(prefix, valid_data_path=(album,), max_images_per_pack=3))


def test_a_resumed_run_leaves_out_the_same_samples(prefix: str) -> None:
    whole, less = config_of(prefix), config_of(prefix, max_images_per_pack=3)
    fingerprints = open_data(whole).fingerprint, open_data(less).fingerprint
    older = {name: value for name, value in fingerprints[0].items() if name != "dropped samples"}
    for before in (fingerprints[0], older):
        saved = {"config": whole.to_dict(), "dataset": before}
        check_data(Path("iter"), saved, whole, fingerprints[0])
        with pytest.raises(CheckpointError, match=r"whose dropped samples are \[\], .*--max-images-per-pack"):
            check_data(Path("iter"), saved, less, fingerprints[1])
    saved = {"config": less.to_dict(), "dataset": fingerprints[1]}
    check_data(Path("iter"), saved, less, fingerprints[1])
    # Another limit that leaves out the same samples keeps the order.
    check_data(Path("iter"), saved, less, open_data(config_of(prefix, max_images_per_pack=4)).fingerprint)
    with pytest.raises(CheckpointError, match="--seq-length"):
        check_data(Path("iter"), saved, whole, fingerprints[0])


def test_text_alone_takes_the_image_size_of_the_run(tmp_path: Path) -> None:
    text = write(tmp_path / "text", [0, 0], [5, 6])
    config = config_of(text)
    hd = replace(config, vision=replace(config.vision, image_size=448, teacher_size=224))
    dataset = open_data(hd).dataset
    assert dataset.planner(300, 200) == image_planner(hd)(300, 200) != image_planner(config)(300, 200)
    with pytest.raises(DataError, match="image size"):
        open_data(replace(hd, data=replace(hd.data, data_path=(write(tmp_path / "both", [1], [5]),))))
