"""Shards of pairs with pictures, a tiny random LLaVA and a file of prompts, for tests of new captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_eve.curation.command import open_work
from megatron_eve.curation.work import Work
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import write_records
from tests.inference.test_baselines import picture

PROMPTS = ("What is it?", "Describe the picture, with all that is on it.", "Generate a coco-style caption.")
DAMAGED, TALK, TEXT = (1, 3), (2, 5), (2, 6)
"""Shard and row of a picture that does not decode, of a conversation about a picture, and of a text."""


def toy_work(folder: Path, shards: int = 4, rows: int = 16) -> Work:
    """A work folder with shards of pairs, in which no stage has been run; and prompts.txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        write_records(folder / f"{shard}.parquet", [_record(shard, row, rows) for row in range(rows)])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return open_work(folder / "work", [str(folder / "*.parquet")])


def _record(shard: int, row: int, rows: int) -> Record:
    number = shard * rows + row
    data = picture(20 + number % 23, 31 + number % 17, number, ("PNG", "JPEG")[number % 2])
    pair = Record(
        id=f"id{number}",
        source="toy",
        kind="pair",
        images=[ImageFile(data[:200] if (shard, row) == DAMAGED else data, f"{number}.jpg")],
        turns=[{"from": "gpt", "value": f"<image>old caption {number}" if number % 2 else "<image>"}],
        meta={"licence": f"CC {number}"},
    )
    if (shard, row) == TALK:
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        return replace(pair, kind="conversation", turns=[asked, {"from": "gpt", "value": "A cat."}])
    if (shard, row) == TEXT:
        return replace(pair, kind="text", images=[], turns=[{"from": "gpt", "value": "Only a text."}])
    return pair
