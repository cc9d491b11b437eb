"""Rows of datasets in the hub's layout: which of them are asked, and their pictures, decoded when they are asked."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from PIL import Image

from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.data_root import DatasetNeed, check_dataset

QUICK_DOCUMENTS = 200
"""About how many documents the tasks of the group `quick` ask; a smaller dataset is asked whole."""
GQA_FOLDER = "lmms-lab-encoder/GQA"
GQA_PICTURES = "testdev_balanced_images"

# Pictures of GQA and their rows, by id. lmms-eval gives a task one document at a time, with nothing beside it.
_gqa: dict[str, tuple[datasets.Dataset, int]] = {}


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with its pictures as files, `{"bytes", "path"}`.

    So nothing is decoded before it is asked, and a damaged picture costs its own question alone.
    """
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return dataset


def pictures(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The pictures of a document, as RGB; none where it has none.

    Raises:
        OSError, ValueError, SyntaxError: as Pillow does for a file that cannot be decoded.
    """
    found = doc["image"]
    return [_decoded(one) for one in (found if isinstance(found, list) else [found]) if one is not None]


def _decoded(picture: Any) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not picture.get("bytes"):
        raise ValueError("the row holds no bytes of its picture")
    return Image.open(io.BytesIO(picture["bytes"])).convert("RGB")


def seed_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """Of SEED-Bench the questions about pictures; the others are about videos."""
    kinds = dataset["data_type"]
    return undecoded(dataset.select([row for row, kind in enumerate(kinds) if kind == "image"]))


def without_picture(dataset: datasets.Dataset) -> datasets.Dataset:
    """Of ScienceQA the questions without a picture."""
    dataset = undecoded(dataset)
    return dataset.select([row for row, picture in enumerate(dataset["image"]) if picture is None])


def quick_pope(dataset: datasets.Dataset) -> datasets.Dataset:
    """The sample of POPE. Its question ids repeat in each category."""
    return quick(dataset, lambda row: f"{row['category']}/{row['question_id']}")


def quick_textvqa(dataset: datasets.Dataset) -> datasets.Dataset:
    """The sample of TextVQA."""
    return quick(dataset, lambda row: str(row["question_id"]))


def quick_sqa(dataset: datasets.Dataset) -> datasets.Dataset:
    """The sample of ScienceQA, which has no ids: by its texts, so that questions of the same texts stay together."""
    return quick(dataset, lambda row: "\n".join([row["hint"] or "", row["question"], *row["choices"]]))


def quick(dataset: datasets.Dataset, name: Callable[[dict[str, Any]], str]) -> datasets.Dataset:
    """About `QUICK_DOCUMENTS` documents, the same ones whenever the dataset is the same: those with a small hash.

    Args:
        dataset: of one split.
        name: what is hashed of a row; it gets no pictures.
    """
    dataset = undecoded(dataset)
    bound = min(1.0, QUICK_DOCUMENTS / max(1, len(dataset))) * 2**64
    texts = dataset.select_columns([one for one in dataset.column_names if one != "image"])
    return dataset.select([row for row, doc in enumerate(texts) if text_hash(name(doc)) < bound])


def read_column(root: Path, need: DatasetNeed) -> list[Any]:
    """The one column of a split that a need names, without the rest of its files.

    Raises:
        DataError: the split or the column is not there.
    """
    tables = [pyarrow.parquet.read_table(file, columns=[*need.columns]) for file in check_dataset(root, need)]
    return [value for table in tables for value in table[need.columns[0]].to_pylist()]


def text_hash(text: str) -> int:
    """64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def gqa(dataset: datasets.Dataset) -> datasets.Dataset:
    """The questions of GQA, whose pictures are another config of the same folder; it is opened, and not decoded.

    Called by lmms-eval with the data root as working directory.

    Raises:
        DataError: a question whose picture is not there.
    """
    found = undecoded(load_split(GQA_FOLDER, GQA_PICTURES, "testdev"))
    _gqa.clear()
    _gqa.update({name: (found, row) for row, name in enumerate(found["id"])})
    for row in dataset.select_columns(["id", "imageId"]):
        if row["imageId"] not in _gqa:
            raise DataError(
                f"eve_gqa, question {row['id']}: its picture {row['imageId']} is not in the config {GQA_PICTURES} of "
                f"{GQA_FOLDER}; get the dataset again"
            )
    return dataset


def gqa_picture(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The picture of a question of GQA."""
    dataset, row = _gqa[doc["imageId"]]
    return pictures(dataset[row])


def load_split(folder: str, config: str | None, split: str) -> datasets.Dataset:
    """A split of a dataset below the working directory, which is the data root where lmms-eval loads a task.

    Raises:
        DataError: it is not there.
    """
    if not Path(folder).is_dir():  # datasets would ask the hub
        raise DataError(
            f"--data-root {Path.cwd()} has no folder {folder}: copy the dataset there, as the hub has it"
        )
    splits = datasets.get_dataset_split_names(folder, config)
    if split not in splits:
        raise DataError(
            f"--data-root {Path.cwd()}: {folder} has no split {split}; there are {', '.join(splits)}"
        )
    return datasets.load_dataset(folder, config, split=split)
