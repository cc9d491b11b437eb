"""The files of a dataset on disk, and the manifest that lists them.

A dataset is a prefix, OUT, and these files:

    OUT_text.bin, .idx    megatron-core IndexedDataset, int32; row i is sample i: n token ids, then n labels
    OUT_image.bin, .idx   megatron-core IndexedDataset, uint8; row j is image j, the bytes of its file
    OUT_pixels.bin, .idx  the same, in place of OUT_image: row j is image j decoded, see `IMAGE_STORAGES`
    OUT_samples.npy       SAMPLE_DTYPE [samples]
    OUT_images.npy        IMAGE_DTYPE [images]
    OUT_drawn.npy         bool [images], which images are to be drawn (`data/format/drawn.py`), if any
    OUT_meta.parquet      source of each sample (`data/format/metadata.py`), if known; training does not read it
    OUT_dataset.json      the manifest (DatasetInfo), written last: without it nothing opens

The image parts are absent when no sample has an image.

The manifest's `parts` names the indexed datasets OUT_<name>.bin and .idx beside the text, and records how each was
made; and, as "drawn", the images that are to be drawn. Unknown parts are ignored, so that later versions may add some.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import AGAIN, DataError
from megatron_eve.data.text.conversation import IGNORE_INDEX, IMAGE_TOKEN_ID, NOT_TEXT_LABELS
from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, TOKENIZERS, split_kind
from megatron_eve.models.family import ImagePlan
from megatron_eve.models.image_flags import ImageFlag, ImageSetting
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family

FORMAT_VERSION = 4
READABLE_VERSIONS = (1, 2, 3, 4)
"""In version 3 `image_settings` are called `image_sizes`. Versions 1 and 2 have no `family`, and each of the settings
as a field of its own. Version 1 has neither `image_storage` nor `parts`: its images are files as they were."""

IMAGE_STORAGES = ("encoded", "jpeg", "pixels")
"""How images are stored.

- encoded: the files as they were, in OUT_image.
- jpeg: JPEG files at the model's size where that is smaller, else the files as they were, in OUT_image.
- pixels: decoded, in OUT_pixels: the views of the picture's plan one after another, each uint8 of its `stored_shape`
  (without the padding to a square).
"""
PIXELS = "pixels"
STORED_AS = {"jpeg": "JPEG files", PIXELS: "pixels"}
"""Storages that hold images made for a model, and what they hold."""

SAMPLE_DTYPE = np.dtype(
    [
        ("length", "<i4"),  # tokens once images are expanded
        ("text_length", "<i4"),  # tokens with an image counted as one
        ("labels", "<i4"),  # tokens that train, after the shift
        ("num_images", "<i4"),
        ("first_image", "<i8"),  # the sample's images are rows first_image .. first_image + num_images - 1
    ]
)
IMAGE_DTYPE = np.dtype([("width", "<i4"), ("height", "<i4"), ("num_bytes", "<i8")])  # pixels, as decoded

TEXT_PARTS = ("_text.bin", "_text.idx", "_samples.npy")
IMAGE_PARTS = ("_image.bin", "_image.idx", "_images.npy")
PIXEL_PARTS = ("_pixels.bin", "_pixels.idx", "_images.npy")
MANIFEST = "_dataset.json"
SKIPPED = "_skipped.jsonl"
"""Ends the name of the list of rows that preprocessing left out, one a line."""
PARTIAL = ".partial"
"""Suffix of a file that is still being written."""

_MAX_PADDING_ROWS = {TOKENIZERS: 512}
_PADDING_ROWS = 64


def max_padding_rows(tokenizer_kind: str) -> int:
    """Rows that an embedding may have beyond its tokenizer's tokens; more mean that it belongs to another tokenizer.

    These are added tokens, and padding to a multiple of 64 (transformers' `resize_token_embeddings`); published models
    with a tokenizer.json, such as Qwen2, have some hundred.
    """
    return _MAX_PADDING_ROWS.get(split_kind(tokenizer_kind)[0], _PADDING_ROWS)


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """The settings that a dataset was made with.

    Attributes:
        model_max_length: samples were cut at this many tokens. An image counts as one, or as its rows where the family
            says so (`TextRules.length_counts_rows`).
        family: name of the model family (see `find_family`).
        image_settings: what images were made into, by name, for those of the family's `image_flags` that decide the
            number of tokens of an image.
        image_storage: one of `IMAGE_STORAGES`; "mixed" in a merged dataset whose parts differ.
        tokenizer_kind: how the tokenizer's file was read, `TextTokenizer.kind`. Manifests of older versions lack
            it: there was one kind.
        chat_template_sha256: digest of the tokenizer's chat template, for `--template chat_template`; else "".
    """

    template: str
    family: str
    image_settings: dict[str, ImageSetting]
    model_max_length: int
    apply_exif: bool
    max_pixels: int
    tokenizer_sha256: str
    vocab_size: int
    image_storage: str = "encoded"
    tokenizer_kind: str = SENTENCEPIECE
    chat_template_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class DatasetInfo(DatasetSettings):
    """The manifest: settings, counts, and the input rows that were left out.

    Attributes:
        num_tokens: tokens of all samples once images are expanded.
        num_text_tokens: the same with an image counted as one.
        num_labels: tokens that train, after the shift.
        num_cut: samples cut at `model_max_length`.
        text_bytes, image_bytes: sizes of OUT_text.bin and OUT_image.bin.
        parts: for each indexed dataset other than the text, by name: how it was made, its `dtype` and its `bytes`.
        longest_sample, longest_length: index of the sample with the most expanded tokens, and their number.
        num_rows: rows of the input that were read.
        skipped: rows left out, by reason.
        skipped_first: the first few of these rows by reason: row (counted from 1), id, image, detail.
        num_missing_images: images that documents name but that were missing; the documents were kept without them.
        changes: what was left out or changed of rows that were kept: counts by the names of `reasons.CHANGES`.
        content_sha256: digest of all samples in their order; empty in a dataset that an older version made.
        licenses: number of samples by their license in OUT_meta.parquet; samples without a license are not counted.
        datasets: only in a merged dataset, which has no other files: for each part its `prefix` (relative to the
            manifest's folder), `num_samples` and `content_sha256`.
    """

    num_samples: int
    num_images: int
    num_tokens: int
    num_text_tokens: int
    num_labels: int
    num_cut: int
    text_bytes: int
    image_bytes: int
    longest_sample: int
    longest_length: int
    num_rows: int
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_first: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    num_missing_images: int = 0
    changes: dict[str, int] = field(default_factory=dict)
    content_sha256: str = ""
    licenses: dict[str, int] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def stored_bytes(self) -> int:
        """Size of the .bin file that holds the images."""
        if self.image_storage == PIXELS:
            return int(self.parts.get(PIXELS, {}).get("bytes", 0))
        return self.image_bytes

    @property
    def made_for(self) -> dict[str, ImageSetting]:
        """Image settings that the stored data depends on: `image_settings`, and those that bind the stored pixels."""
        part = self.parts.get(self.image_part, {})
        bound = {
            name: part[name]
            for name, flag in find_family(self.family).image_flags.items()
            if self.image_storage in flag.binds and name in part
        }
        return {**bound, **self.image_settings}

    @property
    def image_part(self) -> str:
        """Name of the part that holds the images, in `parts`."""
        return PIXELS if self.image_storage == PIXELS else "image"

    def to_json(self) -> str:
        """The text of the manifest file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_info(prefix: str) -> DatasetInfo:
    """Read the manifest of the dataset at `prefix`.

    Raises:
        DataError: missing, not JSON, of another format version, or with unknown or missing fields.
        FamilyError: it was made for a family that is not installed.
    """
    path = Path(prefix + MANIFEST)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(_instead_of_dataset(prefix)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): {AGAIN}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in READABLE_VERSIONS:
        raise DataError(
            f"{path} is of format version {version!r} and this code reads versions 1 to {FORMAT_VERSION}: "
            "make the dataset again with this version's tools/preprocess_data.py"
        )
    try:
        info = DatasetInfo(**_upgraded(content))
    except TypeError as error:
        raise DataError(f"{path} is not a manifest this version wrote ({error}): {AGAIN}") from error
    if info.image_storage not in (*IMAGE_STORAGES, "mixed"):
        raise DataError(
            f"{path} has image storage {info.image_storage!r} and this code reads {', '.join(IMAGE_STORAGES)}: "
            "make the dataset again with this version's tools/preprocess_data.py"
        )
    settings, flags = info.image_settings, find_family(info.family, f"{path}: family").image_flags
    if not isinstance(settings, dict) or not all(
        flags[name].takes(value) for name, value in settings.items() if name in flags
    ):
        raise DataError(f"{path} does not say which image settings it was made for: {AGAIN}")
    if info.image_storage in ("jpeg", PIXELS) and info.num_images and not info.datasets:
        _check_part(path, info, flags)
    return info


def bound_flags(flags: Mapping[str, ImageFlag], image_storage: str) -> dict[str, ImageFlag]:
    """Settings that change no rows, and that images are bound to as they are stored."""
    return {
        name: flag for name, flag in flags.items() if image_storage in flag.binds and not flag.decides_rows
    }


def _check_part(path: Path, info: DatasetInfo, flags: Mapping[str, ImageFlag]) -> None:
    """Raise DataError if the manifest lacks a setting that its stored images are bound to."""
    name = info.image_part
    part = info.parts.get(name, {}) if isinstance(info.parts, dict) else None
    bound = bound_flags(flags, info.image_storage)
    if (
        not isinstance(part, dict)
        or (name == PIXELS and type(part.get("bytes")) is not int)
        or not all(flag.takes(part.get(key)) for key, flag in bound.items())
    ):
        raise DataError(f"{path} does not say what its part {name!r} was made with: {AGAIN}")


def _instead_of_dataset(prefix: str) -> str:
    """What to say of a prefix without a manifest."""
    path = Path(prefix)
    if path.is_dir():
        there = sorted(path.glob(f"*{MANIFEST}"))
        if there:
            return (
                f"{prefix} is a folder: name a dataset in it, such as {str(there[0]).removesuffix(MANIFEST)}"
            )
        return f"{prefix} is a folder without a dataset: name a dataset by its --output-prefix"
    if path.is_file():
        for part in (*TEXT_PARTS, *IMAGE_PARTS, *PIXEL_PARTS, SKIPPED, "_meta.parquet", "_drawn.npy"):
            if prefix.endswith(part) and Path(prefix.removesuffix(part) + MANIFEST).exists():
                return f"{prefix} is a file of the dataset {prefix.removesuffix(part)}: name that"
        return (
            f"{prefix} is a file: name a dataset by its --output-prefix, as tools/preprocess_data.py wrote it"
        )
    return (
        f"{prefix}{MANIFEST} is missing: the path of a dataset is its --output-prefix, without _text.bin or "
        f"{MANIFEST}; if that is what was given, preprocessing did not finish: run it again"
    )


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a manifest of any version to those of this version."""
    if content["format_version"] >= 4:
        return content
    if content["format_version"] == 3:
        return {"image_settings" if name == "image_sizes" else name: value for name, value in content.items()}
    flags = find_family(DEFAULT_FAMILY).image_flags
    settings = {name: content[name] for name in flags if name in content}
    others = {name: value for name, value in content.items() if name not in settings}
    return {**others, "family": DEFAULT_FAMILY, "image_settings": settings}


def sync(path: str) -> None:
    """Return once a file is on the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def publish(path: str) -> None:
    """Flush a finished file to disk and rename it from `path` + ".partial" to `path`."""
    sync(path + PARTIAL)
    os.replace(path + PARTIAL, path)


def open_records(path: str, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    """Map a structured .npy file of `rows` records into memory, read-only.

    Raises:
        DataError: missing, truncated, or not `rows` records of `dtype`.
    """
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {AGAIN}") from None
    except Exception as error:  # numpy parses a header as Python: a damaged one can raise almost anything
        raise DataError(f"{path} cannot be read, it may be truncated ({error}): {AGAIN}") from error
    if records.dtype != dtype or records.shape != (rows,):
        raise DataError(
            f"{path} holds {records.shape} records of {records.dtype}, the manifest says ({rows},): {AGAIN}"
        )
    return records


def row_problem(tokens: NDArray[np.int64], labels: NDArray[np.int64], vocab_size: int) -> str | None:
    """What is wrong with a sample's tokens and labels, or None."""
    if len(tokens) == 0 or len(tokens) != len(labels):
        return f"{len(tokens)} tokens and {len(labels)} labels"
    is_image = tokens == IMAGE_TOKEN_ID
    outside = ~is_image & ((tokens < 0) | (tokens >= vocab_size))
    if outside.any():
        return f"token id {tokens[outside][0]} is out of range for a vocabulary of {vocab_size}"
    if (labels != tokens)[labels != IGNORE_INDEX].any():
        return "a label is neither its token nor the value that is ignored"
    if labels[0] == IMAGE_TOKEN_ID:
        return "an image that is to be drawn stands first, so that nothing predicts it"
    return None


def count_labels(labels: NDArray[np.int64]) -> int:
    """Tokens that train, once labels are shifted."""
    return int(np.count_nonzero(~np.isin(labels[1:], NOT_TEXT_LABELS)))


def placeholder_problem(tokens: NDArray[np.int64], plans: Sequence[ImagePlan]) -> str | None:
    """Why the image placeholders of a sample are not those of its images, or None."""
    found, wanted = np.count_nonzero(tokens == IMAGE_TOKEN_ID), sum(plan.tiles for plan in plans)
    if found == wanted:
        return None
    tiles = f" of {wanted} tiles" if wanted != len(plans) else ""
    return f"{found} image placeholders for {len(plans)} images{tiles}"


def megatron_datasets(module: str) -> Any:
    """Import a module of megatron.core.datasets on first use, without its warnings (about optimizers)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{module}")
