"""What the example requires: bad rows dropped for their reasons, the others with their own pictures and metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import photos
from curation_tiny.downloads import FAILED, GOOD, Row
from launch import StepFailed
from pyarrow import parquet

from megatron_eve.curation.work import Work
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.text.tokenizer import Tokenizer


def found_fates(prepared: Path, work: Work) -> dict[tuple[str, str], str]:
    """What has become of rows after the stages filter and duplicates.

    Args:
        prepared: folder of the prepared downloads.
        work: the curation.

    Returns:
        (download, id) of a row -> the reason for which it was dropped, or GOOD.
    """
    fates = {}
    for listed in prepared.glob("*/skipped.jsonl"):
        for line in listed.read_text().splitlines():
            skipped = json.loads(line)
            fates[listed.parent.name, skipped["id"]] = skipped["reason"]
    for shard, file in enumerate(work.inputs.files):
        rows = work.read_table("filter", shard, ("row", "id", "reason")).to_pylist()
        copies = work.read_table("duplicates", shard, ("row", "reason")).to_pylist()
        reason = {row["row"]: row["reason"] for row in copies}
        for row in rows:
            fates[file.parent.name, row["id"]] = row["reason"] or reason.get(row["row"]) or GOOD
    return fates


def check_fates(rows: Sequence[Row], found: dict[tuple[str, str], str]) -> Counter[str]:
    """Compare what has become of rows with what has to become of them.

    Returns:
        The number of rows of each fate.

    Raises:
        StepFailed: a row was dropped for another reason than it has to be, or not dropped.
    """
    wrong = [
        f"{row.source} {row.id} ({row.kind}): {found.get((row.source, row.id), FAILED)}, not {row.fate}"
        for row in rows
        if found.get((row.source, row.id), FAILED) != row.fate
    ]
    if wrong:
        raise StepFailed(f"{len(wrong)} of {len(rows)} rows have another fate: {'; '.join(wrong[:5])}")
    return Counter(row.fate for row in rows)


def check_dataset(rows: Sequence[Row], prefix: Path, tokenizer: Path) -> tuple[int, int]:
    """Check that each row of a dataset has its own picture and metadata, and that none is there twice.

    Args:
        rows: of the downloads.
        prefix: of the dataset.
        tokenizer: that it was made with.

    Returns:
        The number of rows, and of those whose caption is the sentence of the photo that they show.

    Raises:
        StepFailed: a row is there twice, had to be dropped, or has the picture or the metadata of another.
    """
    by_id = {(row.source, row.id): row for row in rows}
    sentences, words, right = photos.load_captions(), Tokenizer(tokenizer), 0
    dataset = open_dataset(prefix)
    seen = set()
    for number, found in enumerate(parquet.read_table(f"{prefix}_meta.parquet").to_pylist()):
        key = (found["source"], found["id"])
        row = by_id[key]
        if key in seen or row.fate != GOOD:
            raise StepFailed(f"row {number} of the dataset, {key}, is there twice or had to be dropped")
        seen.add(key)
        meta = json.loads(found["meta"])
        url = {"sa1b": None, "openimages": meta.get("OriginalURL"), "laion": meta.get("url")}[row.source]
        if (
            dataset.image_bytes(number) != row.picture
            or url != (None if row.source == "sa1b" else row.url)
            or meta.get("original_caption", "") != row.caption
            or found["license"] != row.license
        ):
            raise StepFailed(
                f"row {number} of the dataset, {key}, has the picture or the metadata of another row"
            )
        tokens, labels = dataset.text(number)
        right += words.decode(tokens[labels >= 0].tolist()).strip() == sentences[row.kind]
    if len(seen) != len(dataset):
        raise StepFailed(f"the dataset has {len(dataset)} rows, and metadata of {len(seen)}")
    return len(seen), right
