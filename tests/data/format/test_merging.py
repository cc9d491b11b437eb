"""Datasets that are merged, against the same rows made in one piece; and what does not go together."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_eve.config import parse
from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.indexed import DatasetWriter, IndexedVisionDataset, StoredImage
from megatron_eve.data.format.joined import JoinedDataset, MergedDataset, open_dataset
from megatron_eve.data.format.manifest import DatasetInfo, read_info
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.training.loop.data import open_data
from tests.data.helpers import MINI_SETTINGS, encoded, picture
from tools.merge_datasets import main

# Pictures of each sample.
COUNTS = {"a": [1, 0, 2], "b": [0, 0], "c": [0, 3, 1, 1]}


def write(prefix: Path, counts: list[int], first: int = 0, **settings: Any) -> DatasetInfo:
    """Samples with so many pictures each; the n-th sample of all is the same in whatever dataset it stands."""
    with DatasetWriter(prefix, replace(MINI_SETTINGS, **settings)) as writer:
        for number, count in enumerate(counts, first):
            images = []
            for i in range(count):
                width, height = 20 + number, 10 + 3 * i
                images.append(StoredImage(encoded(picture(width, height, seed=number), "PNG"), width, height))
            tokens = [1, *[-200] * count, *range(5, 8 + number)]
            writer.add_sample(tokens, [-100] * (1 + count) + tokens[1 + count :], images)
        skipped = {"image_missing": 6}
        first_rows = {
            "image_missing": [{"row": i, "id": None, "image": "x", "detail": "x"} for i in range(5)]
        }
        return writer.finalise(num_rows=len(counts) + 6, skipped=skipped, skipped_first=first_rows)


@pytest.fixture
def prefixes(tmp_path: Path) -> list[str]:
    first = 0
    for name, counts in COUNTS.items():
        write(tmp_path / "parts" / name, counts, first)
        first += len(counts)
    return [str(tmp_path / "parts" / name) for name in COUNTS]


def test_merged_is_what_one_piece_is(tmp_path: Path, prefixes: list[str]) -> None:
    merge_datasets(str(tmp_path / "all"), prefixes)
    write(tmp_path / "whole", [count for counts in COUNTS.values() for count in counts])
    merged, whole = open_dataset(tmp_path / "all"), open_dataset(tmp_path / "whole")
    assert (type(merged), type(whole)) == (MergedDataset, IndexedVisionDataset)
    assert len(merged) == len(whole) == len(merged.samples)
    everyone = np.arange(len(whole))
    assert (merged.samples[everyone] == whole.samples[everyone]).all()
    assert (merged.samples["length"] == whole.samples["length"]).all()
    for row in everyone:
        for ours, theirs in zip(merged.text(row), whole.text(row), strict=True):
            assert (ours == theirs).all()
    for image in range(whole.info.num_images):
        assert merged.image_bytes(image) == whole.image_bytes(image)
        assert merged.image_plan(image) == whole.image_plan(image)
    different = {"num_rows", "skipped", "skipped_first", "content_sha256", "datasets", "parts"}
    for field in DatasetInfo.__dataclass_fields__.keys() - different:
        assert getattr(merged.info, field) == getattr(whole.info, field), field
    assert (merged.info.num_rows, merged.info.skipped) == (9 + 18, {"image_missing": 18})
    named = merged.info.skipped_first["image_missing"]
    assert [row["dataset"] for row in named] == ["parts/a"] * 5
    options: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1, "views": ["patches"]}
    ours, theirs = (build_batch(data, [6, 0, 8], **options).pixels["patches"] for data in (merged, whole))
    assert ours is not None and theirs is not None and ours.equal(theirs)


def test_a_run_goes_through_the_samples_as_through_one_piece(tmp_path: Path, prefixes: list[str]) -> None:
    merge_datasets(str(tmp_path / "all"), prefixes)
    write(tmp_path / "whole", [count for counts in COUNTS.values() for count in counts])
    flags = ["--preset", "eve_mini", "--global-batch-size", "3", "--train-iters", "6", "--split", "2,1"]
    runs = [open_data(parse([*flags, "--data-path", str(tmp_path / name)])) for name in ("all", "whole")]
    assert [len(run.training) for run in runs] == [1, 1]
    orders = [run.order(np.arange(18)).tolist() for run in runs]
    assert orders[0] == orders[1]
    assert [len(run.held_out[0]) for run in runs] == [3, 3]
    # Limits of the run leave the same rows out.
    limited = [*flags, "--max-images-per-pack", "1"]
    left = [open_data(parse([*limited, "--data-path", str(tmp_path / name)])) for name in ("all", "whole")]
    assert left[0].order(np.arange(18)).tolist() == left[1].order(np.arange(18)).tolist()
    assert left[0].dropped and left[0].dropped[0].startswith("2 of 9 samples cannot be packed")


def test_only_a_manifest_is_written_and_all_may_move(tmp_path: Path, prefixes: list[str]) -> None:
    merge_datasets(str(tmp_path / "all"), prefixes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all_dataset.json", "parts"]
    tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert len(open_dataset(tmp_path.with_name("elsewhere") / "all")) == 9
    tmp_path.with_name("elsewhere").rename(tmp_path)


def test_merged_of_merged_names_the_parts(tmp_path: Path, prefixes: list[str]) -> None:
    merge_datasets(str(tmp_path / "two"), prefixes[:2])
    info = merge_datasets(str(tmp_path / "parts" / "all"), [str(tmp_path / "two"), prefixes[2]])
    assert [part["prefix"] for part in info.datasets] == ["a", "b", "c"]
    joined = JoinedDataset([open_dataset(tmp_path / "parts" / "all"), open_dataset(prefixes[0])])
    assert joined.text(9 + 2)[0].tolist() == open_dataset(prefixes[0]).text(2)[0].tolist()
    assert joined.sample_name(8) == f"row 3 of {prefixes[2]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"template": "vicuna_v1"},
            "has template 'vicuna_v1' and .*a_dataset.json 'plain': name datasets of two",
        ),
        (
            {"image_settings": {"image_size": 448, "teacher_size": 112}},
            "has image_size 448 and .* 224: preprocess all with the same --image-size",
        ),
        (
            {"family": "megatron_eve.models.eve.family"},  # by its module: another name
            "has family 'megatron_eve.*' and .* 'eve': preprocess all with the same --family",
        ),
        ({"apply_exif": True}, "has apply_exif True and .* False: .*--ignore-exif-orientation"),
        (
            {"tokenizer_sha256": "cd" * 32},
            "has tokenizer_sha256 'cd.*: preprocess all with the same --tokenizer-model",
        ),
    ],
)
def test_what_differs_is_refused(tmp_path: Path, prefixes: list[str], change: Any, message: str) -> None:
    write(tmp_path / "other", [1], **change)
    with pytest.raises(DataError, match=rf"{tmp_path}/other_dataset.json {message}"):
        merge_datasets(str(tmp_path / "all"), [*prefixes, str(tmp_path / "other")])
    assert not (tmp_path / "all_dataset.json").exists()


def test_text_alone_goes_with_any_sizes(tmp_path: Path, prefixes: list[str]) -> None:
    write(tmp_path / "text", [0, 0], image_settings={"image_size": 448, "teacher_size": 224}, apply_exif=True)
    info = merge_datasets(str(tmp_path / "all"), [str(tmp_path / "text"), *prefixes])
    assert (info.image_settings, info.apply_exif) == (MINI_SETTINGS.image_settings, MINI_SETTINGS.apply_exif)
    open_dataset(tmp_path / "all").check_compatible(
        tokenizer_sha256=info.tokenizer_sha256,
        vocab_size=info.vocab_size,
        family="eve",
        image_settings={"image_size": 224, "teacher_size": 112},
    )
    with pytest.raises(
        DataError, match=r"parts/a_dataset.json was made for image size 224 and the run has 448"
    ):
        open_dataset(tmp_path / "all").check_compatible(
            tokenizer_sha256=None,
            vocab_size=info.vocab_size,
            family="eve",
            image_settings={"image_size": 448, "teacher_size": 112},
        )


def test_a_part_that_changed_or_is_gone(tmp_path: Path, prefixes: list[str]) -> None:
    merge_datasets(str(tmp_path / "all"), prefixes)
    write(Path(prefixes[1]), [0, 0, 0])
    with pytest.raises(
        DataError, match=r"parts/b_dataset.json is another dataset .* tools/merge_datasets.py again"
    ):
        open_dataset(tmp_path / "all")
    shutil.rmtree(tmp_path / "parts")
    with pytest.raises(DataError, match=r"parts/a_dataset.json is missing"):
        open_dataset(tmp_path / "all")


def test_the_command(tmp_path: Path, prefixes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "all"
    assert main(["--output-prefix", str(out), *(f"{prefix}_dataset.json" for prefix in prefixes)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}_dataset.json: 9 samples, 8 images and ")
    for wrong, message in (
        ([prefixes[0], f"{tmp_path}/parts/../parts/a"], "is named 2 times: its samples would stand twice"),
        ([f"{tmp_path}/none"], f"{tmp_path}/none_dataset.json is missing"),
    ):
        assert main(["--output-prefix", str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err
    Path(f"{prefixes[2]}_dataset.json").rename(f"{prefixes[2]}_dataset.json.partial")
    assert main(["--output-prefix", str(tmp_path / "two"), *prefixes[:2]]) == 0
    assert capsys.readouterr().err == f"warning: {prefixes[2]} is not finished, so it is left out\n"
    assert len(json.loads(Path(f"{out}_dataset.json").read_text())["datasets"]) == 3


def test_a_dataset_is_replaced_only_if_that_is_asked_for(
    tmp_path: Path, prefixes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "all")
    assert main(["--output-prefix", out, *prefixes]) == 0
    before = Path(f"{out}_dataset.json").read_bytes()
    capsys.readouterr()
    for there, samples in ((out, 9), (prefixes[0], 3)):
        assert main(["--output-prefix", there, *prefixes[1:]]) == 2
        told = rf"error: {there} is a dataset already \(made 20\S+, {samples} samples\): add --overwrite to replace it,"
        assert re.match(told + " or choose another --output-prefix\n$", capsys.readouterr().err)
    assert Path(f"{out}_dataset.json").read_bytes() == before
    assert read_info(prefixes[0]).datasets == []
    for flags in ([], ["--overwrite"]):
        assert main(["--output-prefix", prefixes[0], *prefixes, *flags]) == 2
        assert "a is one of the datasets to merge: choose another" in capsys.readouterr().err
    assert main(["--output-prefix", out, *prefixes[:2], "--overwrite"]) == 0
    assert len(open_dataset(out)) == 5
    assert main(["--output-prefix", prefixes[0], *prefixes[1:], "--overwrite"]) == 0
    assert [path.name for path in (tmp_path / "parts").glob("a_*")] == ["a_dataset.json"]
    assert len(open_dataset(prefixes[0])) == 6
