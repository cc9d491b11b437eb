"""All stages, from three downloads to a merged dataset: each row has its own picture, metadata and caption."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.curation.toy import SOURCES, Row, make_toy
from tests.golden_dir import find_golden
from tests.inference.openai_server import Served, serving
from tools.curate import main as curate
from tools.merge_datasets import main as merge
from tools.preprocess_data import main as preprocess

TOKENIZER = find_golden("tokenize") / "tokenizer.model"


class CaptionsOfFiles(Served):
    """A server whose caption of a picture says which file it is."""

    def __init__(self) -> None:
        super().__init__(None)
        self.models = [{"id": "captions", "max_model_len": 4096}]

    def _chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        (url,) = (part["image_url"]["url"] for part in body["messages"][-1]["content"] if "image_url" in part)
        text = caption_of(base64.b64decode(url.partition(",")[2]))
        return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def caption_of(picture: bytes) -> str:
    """What the server says of a file."""
    return f"This is a photo whose file has the digest {hashlib.sha256(picture).hexdigest()[:16]}."


@pytest.mark.slow
def test_three_downloads_become_a_dataset_with_the_right_metadata(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, views=1, rows_per_shard=40)
    work = tmp_path / "work"
    with serving(CaptionsOfFiles()) as (address, _):
        for stage, *flags in toy.stages(["--base-url", address, "--model", "captions"]):
            assert curate([stage, "--work", str(work), *flags]) == 0, stage
    shards = sorted((work / "build").glob("*.parquet"))
    prefixes = [str(tmp_path / f"part{shard.stem}") for shard in shards]
    for shard, prefix in zip(shards, prefixes, strict=True):
        words = ["--input", str(shard), "--tokenizer-model", str(TOKENIZER), "--output-prefix", prefix]
        assert (
            preprocess([*words, "--template", "plain", "--image-size", "224", "--teacher-size", "112"]) == 0
        )
    assert merge(["--output-prefix", str(tmp_path / "all"), *prefixes]) == 0

    rows = {(row.source, row.id): row for row in toy.rows}
    dataset, tokenizer = open_dataset(tmp_path / "all"), Tokenizer(TOKENIZER)
    metas = [meta for prefix in prefixes for meta in parquet.read_table(f"{prefix}_meta.parquet").to_pylist()]
    assert len(dataset) == len(metas)
    for number, meta in enumerate(metas):
        row = rows.pop((meta["source"], meta["id"]))  # so none is there twice
        assert row.is_good
        assert row.picture is not None and dataset.image_bytes(number) == row.picture
        tokens, labels = dataset.text(number)
        assert tokenizer.decode(tokens[labels >= 0].tolist()).strip() == caption_of(row.picture)
        assert meta["license"] == row.license
        _assert_metadata(row, json.loads(meta["meta"]))
    left = Counter(meta["source"] for meta in metas)
    # Of 59 good rows three of each of 12 clusters at most.
    assert sum(left.values()) == _selected(work) < sum(row.is_good for row in toy.rows) and set(left) == {
        *SOURCES
    }


def _assert_metadata(row: Row, meta: dict[str, Any]) -> None:
    if row.source == "sa1b":
        assert (meta["image_id"], meta["file_name"]) == (int(row.id[3:]), f"{row.id}.jpg")
    elif row.source == "openimages":
        assert (meta["OriginalURL"], meta["Author"]) == (row.url, f"Author of {row.id}")
    else:
        assert meta["url"] == row.url
    assert meta.get("original_caption", "") == row.caption


def _selected(work: Path) -> int:
    return sum(len(parquet.read_table(path)) for path in (work / "select").glob("*.parquet"))
