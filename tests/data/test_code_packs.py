"""Packs with codes: of one dataset, of several, of mock data; and codes that a run cannot read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.drawn import drawn_counts
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset
from megatron_eve.data.inspecting.layout import row_layout
from megatron_eve.data.mock import MockDataset
from megatron_eve.data.opening import check_code_tower, open_datasets
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.data.sampling.orders import DatasetSlice, ShuffledOrder
from megatron_eve.models.family import CodeSizes
from megatron_eve.models.registry import find_family
from megatron_eve.training.monitoring.flops import step_work
from tests.data.drawn_rows import BOTH, DRAW, READ, ROWS, TEXT, add_codes, make_dataset, run_config
from tests.data.helpers import MakeConfig
from tests.data.tokenizing.helpers import SETTINGS, some_codes

ALONE: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1, "views": []}


def codes_of(images: list[int]) -> torch.Tensor:
    """What `add_codes` gives to images of a dataset, one behind the other."""
    shape = (4, 4, 4)
    every = [(np.arange(image, image + 1)[:, None] * 7 + np.arange(64) * 3) % 1024 for image in images]
    return torch.from_numpy(np.concatenate([one.reshape(shape).reshape(ROWS, 4) for one in every]))


def test_a_pack_has_the_codes_of_its_pictures(make_config: MakeConfig) -> None:
    prefix = make_dataset(make_config, [READ, DRAW, TEXT, BOTH])
    add_codes(prefix)
    dataset = open_datasets(run_config(prefix)).joined()
    batch = build_batch(dataset, [3, 2, 0, 1], codes=True, **ALONE)
    assert batch.codes is not None and batch.codes.dtype == torch.int64
    assert torch.equal(batch.codes, codes_of([2, 3, 0, 1]))
    assert batch.drawn.tolist() == [False, True, False, True] and batch.image_rows.tolist() == [ROWS] * 4
    for start, drawn in zip(batch.image_starts.tolist(), batch.drawn.tolist(), strict=True):
        rows = batch.labels[start - 1 : start + ROWS]
        assert rows[:-1].tolist() == [-100] * ROWS
        assert (rows[-1] >= 0) == drawn  # the last row of a drawn picture predicts <im_end>
    empty = build_batch(dataset, [], codes=True, **ALONE)
    assert empty.codes is not None and empty.codes.shape == (0, 4) and empty.drawn.shape == (0,)
    assert build_batch(dataset, [1], **ALONE).codes is None


def test_datasets_side_by_side_and_merged(make_config: MakeConfig) -> None:
    """Numbers of images go on from one to the next; a dataset of text alone needs no codes."""
    names = [
        make_dataset(make_config, rows, name)
        for name, rows in (("a", [READ, DRAW]), ("text", [TEXT]), ("b", [BOTH]))
    ]
    for name in (names[0], names[2]):
        add_codes(name)
    merged = str(Path(names[0]).parent / "merged")
    merge_datasets(merged, names)
    assert drawn_counts(open_dataset(merged).info) == (2, 2 * ROWS)
    for paths in (names, [merged]):
        dataset = open_datasets(run_config(*paths)).joined()
        batch = build_batch(dataset, [3, 0, 2, 1], codes=True, **ALONE)
        assert torch.equal(batch.codes, codes_of([0, 1, 0, 1]))  # type: ignore[arg-type]
        assert batch.drawn.tolist() == [False, True, False, True]
        assert dataset.visual_labels(np.arange(4)).tolist() == [0, ROWS, 0, ROWS]
        assert step_work(dataset, np.array([3, 1, 0])).visual_labels == 2 * ROWS
        with StepLoaderOf(dataset) as loader:
            step = loader.step(0)
            assert (
                step.num_visual_labels
                == 2 * ROWS
                == sum(int(one.image_rows[one.drawn].sum()) for one in step.batches)
            )
    only_text = open_datasets(run_config(names[1])).joined()
    found = build_batch(only_text, [0], codes=True, **ALONE)
    assert found.codes is not None and found.codes.shape == (0, 4)


class StepLoaderOf:
    """A loader of one step with all samples."""

    def __init__(self, dataset: Any) -> None:
        order = ShuffledOrder([DatasetSlice("set", 0, len(dataset), 0, len(dataset))], 0, False)
        self.loader = StepLoader(
            dataset, order, global_batch_size=len(dataset), seq_length=512, data_parallel_rank=0,
            data_parallel_size=1, views=[], codes=True,
        )  # fmt: skip

    def __enter__(self) -> StepLoader:
        return self.loader

    def __exit__(self, *_: object) -> None:
        self.loader.close()


def test_mock_data_has_random_codes_and_pictures_to_draw() -> None:
    planner = find_family("vila_u").image_planner({"code_grid": 4})
    sizes = CodeSizes((4, 4), 4, 1000)
    mock = MockDataset(64, vocab_size=388, planner=planner, seq_length=512, seed=3, codes=sizes)
    batch = build_batch(mock, range(16), codes=True, **ALONE)
    assert batch.codes is not None and batch.codes.shape == (ROWS * len(batch.drawn), 4)
    assert batch.codes.max() < 1000 and len(batch.codes.unique()) > 500
    assert 0 < batch.drawn.sum() < len(batch.drawn)
    assert int(mock.visual_labels(np.arange(16)).sum()) == ROWS * int(batch.drawn.sum())
    plain = MockDataset(64, vocab_size=388, planner=planner, seq_length=512, seed=3)
    assert all(
        (plain.samples[name] == mock.samples[name]).all() for name in ("length", "labels", "num_images")
    )
    assert not plain.visual_labels(np.arange(64)).any()
    for index in range(16):
        tokens, labels = mock.text(index)
        assert (labels[1:] >= 0).sum() == mock.samples[index]["labels"]
        assert sorted(tokens[tokens >= 0]) == sorted(plain.text(index)[0][plain.text(index)[0] >= 0])


@pytest.fixture
def prefix(make_config: MakeConfig) -> str:
    return make_dataset(make_config, [READ, DRAW, TEXT])


def test_codes_are_needed(prefix: str, make_config: MakeConfig) -> None:
    with pytest.raises(
        DataError, match=r"set_codes.json is missing: .* has no codes; make them with tools/token"
    ):
        open_datasets(run_config(prefix))
    add_codes(prefix)
    size = Path(prefix + "_codes.bin").stat().st_size
    with Path(prefix + "_codes.bin").open("r+b") as file:
        file.truncate(size - 2)
    with pytest.raises(DataError, match=r"set_codes.bin is truncated: it has 254 bytes where 2 images"):
        open_datasets(run_config(prefix))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"grid": (2, 8)}, "has codes of a grid of 2 x 8 and the model's tower has 4 x 4"),
        ({"depth": 3}, "has codes of depth 3 and the model's tower has 4"),
        ({"codebook_size": 512}, "has codes of a codebook of 512 and the model's tower has 1,024"),
    ],
)
def test_codes_of_another_size(prefix: str, codes: dict[str, Any], message: str) -> None:
    add_codes(prefix, **codes)
    with pytest.raises(DataError, match=f"set_codes.json {message}: give the tower that they"):
        open_datasets(run_config(prefix))


def test_a_code_that_the_codebook_has_not(prefix: str) -> None:
    add_codes(prefix)
    with Path(prefix + "_codes.bin").open("r+b") as file:
        file.seek(128)  # of the second image
        file.write(np.uint16(1024).tobytes())
    with pytest.raises(
        DataError, match=r"image 1 of .*set_codes.bin: code 1,024 is not below .*; copy it again"
    ):
        open_datasets(run_config(prefix))


def test_codes_of_another_tower(
    prefix: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_codes(prefix)
    other = make_dataset(make_config, [DRAW], "other")
    add_codes(other, tower_sha256="ee" * 32)
    with pytest.raises(
        DataError, match=r"other_codes.json has tower_sha256 eeeeeeeeeeee... and .*set_codes.json"
    ):
        open_datasets(run_config(prefix, other))
    opened = open_datasets(run_config(other))
    family = type(find_family("vila_u"))
    monkeypatch.setattr(family, "code_tower", lambda *_: object())
    codes = "megatron_eve.data.opening.find_image_codes"
    monkeypatch.setattr(codes, lambda _: type("Codes", (), {"sha256": lambda *_: SETTINGS.tower_sha256}))
    with pytest.raises(DataError, match=r"other_codes.json has codes of another tower \(sha256 eeeeeeeeeeee"):
        check_code_tower(run_config(other), opened.codes)
    check_code_tower(run_config(prefix), open_datasets(run_config(prefix)).codes)


def changed_json(prefix: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = Path(prefix + "_dataset.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_drawn_is_checked(prefix: str) -> None:
    """The part, the manifest and the labels say the same, or the dataset is refused."""
    path = Path(prefix + "_drawn.npy")
    good = path.read_bytes()
    assert list(check_dataset(open_dataset(prefix), CheckCounts(), workers=1, advance=lambda _: None)) == []
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"set_drawn.npy cannot be read, it may be truncated"):
        IndexedVisionDataset(prefix)
    np.save(path, np.array([True, False]))
    with pytest.raises(
        DataError, match=r"row 0 of .*set_text.bin: its labels say that 0 of 1 images are to be dr"
    ):
        IndexedVisionDataset(prefix).text(0)
    np.save(path, np.array([True, True]))
    with pytest.raises(
        DataError, match=r"set_drawn.npy says that 2 images are to be drawn and .*set_dataset.json 1"
    ):
        IndexedVisionDataset(prefix)
    path.unlink()
    with pytest.raises(DataError, match=r"set_drawn.npy is missing"):
        IndexedVisionDataset(prefix)
    path.write_bytes(good)
    changed_json(prefix, lambda content: content["parts"]["drawn"].update(visual_labels=17))
    damages = list(check_dataset(open_dataset(prefix), CheckCounts(), workers=1, advance=lambda _: None))
    assert [str(one) for one in damages] == [
        f"{prefix}_dataset.json: visual_labels of drawn is 17 and the images to draw have 16 rows"
    ]
    changed_json(prefix, lambda content: content["parts"]["drawn"].update(images="1"))
    with pytest.raises(DataError, match="does not say how many images are to be drawn"):
        IndexedVisionDataset(prefix)
    changed_json(prefix, lambda content: content["parts"].pop("drawn"))
    with pytest.raises(DataError, match=r"row 1 of .*set_text.bin: its labels say that 1 of 1 images"):
        IndexedVisionDataset(prefix).text(1)


def test_a_row_shows_what_is_to_be_drawn(prefix: str) -> None:
    dataset = open_dataset(prefix)
    read, drawn = row_layout(dataset, 0, None), row_layout(dataset, 1, None)
    assert [piece.text for piece in read.pieces if piece.image == 0] == ["[image 1]"]
    assert [piece.text for piece in drawn.pieces if piece.image == 0] == ["[image 1, to draw]"]
    assert (read.drawn, drawn.drawn) == ([False], [True])


def test_some_codes_are_those_that_add_codes_writes() -> None:
    assert (some_codes(SETTINGS, 3, 4).reshape(-1)[:4] == (21 + np.arange(4) * 3) % 500).all()
