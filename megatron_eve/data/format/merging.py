"""Merged datasets: a manifest that names several datasets, and no other file.

To a run a merged dataset is one dataset, with one share of a blend, one split and one line of held-out losses.
`joined.MergedDataset` opens it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.code_part import CodePart, JoinedCodes, has_codes
from megatron_eve.data.format.drawn import DRAWN, PART, drawn_counts, part_record
from megatron_eve.data.format.indexed import IndexedVisionDataset
from megatron_eve.data.format.joined import AnyDataset
from megatron_eve.data.format.manifest import (
    IMAGE_PARTS,
    MANIFEST,
    PARTIAL,
    PIXEL_PARTS,
    SKIPPED,
    TEXT_PARTS,
    DatasetInfo,
    DatasetSettings,
    publish,
    read_info,
)
from megatron_eve.data.format.metadata import META
from megatron_eve.data.format.output import check_output
from megatron_eve.data.format.sample_block import sum_changes
from megatron_eve.data.format.write_lock import WriteLock
from megatron_eve.data.text.text_tokenizer import SAME_KIND

_FIRST_SKIPPED = 5  # skipped rows that a manifest lists for each reason
_REMEDIES = {
    "template": "name datasets of two templates side by side in --data-path instead",
    "chat_template_sha256": "name datasets of two chat templates side by side in --data-path instead",
    "tokenizer_sha256": "preprocess all with the same --tokenizer-model",
    "tokenizer_kind": SAME_KIND,
    "vocab_size": "preprocess all with the same --tokenizer-model",
}
# Settings in which a text-only dataset may differ from the others, as in image settings.
_REMEDIES_OF_IMAGES = {
    "family": "preprocess all with the same --family",
    "apply_exif": "preprocess all with or without --ignore-exif-orientation",
}


def merge_datasets(prefix: str, prefixes: Sequence[str], *, overwrite: bool = False) -> DatasetInfo:
    """Write the manifest of a dataset that holds all samples of others, which stay where they are.

    A merged dataset among them is replaced by its parts. Paths in the manifest are relative to its folder, so that the
    whole tree can be moved.

    Args:
        prefix: of the merged dataset.
        prefixes: of at least one dataset, in the order of their samples.
        overwrite: replace a dataset that `prefix` has already, and remove the files of its own that it has.

    Raises:
        DataError: a dataset does not open, is named twice or is incompatible with the others, or `prefix` is that of
            one of them or, without `overwrite`, of another dataset.
    """
    parts = [part for one in prefixes for part in _parts(one)]
    if os.path.realpath(prefix) in map(os.path.realpath, parts):
        raise DataError(f"{prefix} is one of the datasets to merge: choose another --output-prefix")
    check_output(prefix, overwrite)
    for part, count in Counter(os.path.realpath(part) for part in parts).items():
        if count > 1:
            raise DataError(f"{part} is named {count} times: its samples would stand twice in {prefix}")
    datasets = [IndexedVisionDataset(part) for part in parts]
    infos = [dataset.info for dataset in datasets]
    first = _check_alike(parts, infos)
    check_codes_alike(datasets)
    folder = Path(prefix).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    merged = _merged_info(first, [os.path.relpath(part, folder) for part in parts], infos)
    with WriteLock(prefix):
        Path(prefix + MANIFEST + PARTIAL).write_text(merged.to_json(), encoding="utf-8")
        publish(prefix + MANIFEST)
        for part in {
            *TEXT_PARTS,
            *IMAGE_PARTS,
            *PIXEL_PARTS,
            DRAWN,
            META,
            SKIPPED,
        }:  # of a dataset that was replaced
            Path(prefix + part).unlink(missing_ok=True)
    return merged


def check_codes_alike(datasets: Sequence[AnyDataset]) -> list[str]:
    """Check that the codes of datasets, where they have some, go together: a merged dataset has those of its parts.

    Returns:
        Prefixes of the datasets with images that lack codes while others have some, so that the merged one has none.

    Raises:
        DataError: codes that do not open, or of several towers.
    """
    with_images = [dataset for dataset in datasets if dataset.info.num_images]
    if codes := [CodePart(one.prefix, one) for one in with_images if has_codes(one.prefix)]:
        JoinedCodes(codes)
    return [one.prefix for one in with_images if codes and not has_codes(one.prefix)]


def _parts(prefix: str) -> Iterator[str]:
    """Prefixes of the datasets with files of their own that a dataset consists of."""
    parts = read_info(prefix).datasets
    if not parts:
        yield prefix
    for part in parts:
        yield os.path.normpath(Path(prefix).parent / part["prefix"])


def _check_alike(prefixes: Sequence[str], infos: Sequence[DatasetInfo]) -> DatasetInfo:
    """Check that the datasets agree where they must (else DataError); return a manifest with their settings."""
    with_images = [number for number, info in enumerate(infos) if info.num_images] or [0]
    first = infos[with_images[0]]
    of_settings = {
        name: f"preprocess all with the same --{name.replace('_', '-')}"
        for info in infos
        for name in info.image_settings
    }
    for name, remedy in (_REMEDIES | _REMEDIES_OF_IMAGES | of_settings).items():
        numbers = range(len(infos)) if name in _REMEDIES else with_images
        values = [{**vars(infos[number]), **infos[number].image_settings}.get(name) for number in numbers]
        for number, value in zip(numbers, values, strict=True):
            if value != values[0]:
                raise DataError(
                    f"{prefixes[number]}{MANIFEST} has {name} {value!r} and {prefixes[numbers[0]]}{MANIFEST} "
                    f"{values[0]!r}: {remedy}"
                )
    return first


def _merged_info(first: DatasetInfo, names: Sequence[str], infos: Sequence[DatasetInfo]) -> DatasetInfo:
    settings = {field.name: getattr(first, field.name) for field in dataclasses.fields(DatasetSettings)}
    storages = {info.image_storage for info in infos if info.num_images} or {first.image_storage}
    settings["image_storage"] = storages.pop() if len(storages) == 1 else "mixed"
    settings["max_pixels"] = max(info.max_pixels for info in infos)
    settings["model_max_length"] = max(info.model_max_length for info in infos)
    counted = (
        "num_samples", "num_images", "num_tokens", "num_text_tokens", "num_labels", "num_cut", "text_bytes",
        "image_bytes", "num_rows", "num_missing_images",
    )  # fmt: skip
    sums = {name: sum(getattr(info, name) for info in infos) for name in counted}
    longest = max(range(len(infos)), key=lambda number: infos[number].longest_length)
    skipped: Counter[str] = Counter()
    licenses: Counter[str] = Counter()
    skipped_first: dict[str, list[dict[str, Any]]] = {}
    for name, info in zip(names, infos, strict=True):
        skipped.update(info.skipped)
        licenses.update(info.licenses)
        for reason, rows in info.skipped_first.items():
            named = [{"dataset": name, **row} for row in rows]
            skipped_first[reason] = [*skipped_first.get(reason, []), *named][:_FIRST_SKIPPED]
    drawn = [sum(counts) for counts in zip(*map(drawn_counts, infos), strict=True)]
    changes = sum_changes(info.changes for info in infos)
    contents = [info.content_sha256 for info in infos]
    return DatasetInfo(
        **settings,
        **sums,
        longest_sample=sum(info.num_samples for info in infos[:longest]) + infos[longest].longest_sample,
        longest_length=infos[longest].longest_length,
        skipped=dict(skipped),
        skipped_first=skipped_first,
        content_sha256=hashlib.sha256("".join(contents).encode()).hexdigest() if all(contents) else "",
        changes=changes,
        licenses=dict(licenses),
        parts={PART: part_record(*drawn)} if drawn[0] else {},
        datasets=[
            {"prefix": name, "num_samples": info.num_samples, "content_sha256": info.content_sha256}
            for name, info in zip(names, infos, strict=True)
        ],
    )
