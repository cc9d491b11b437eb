"""Preprocessing of a million rows in the memory of ten thousand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.command_cost import CommandCost, run_preprocess
from megatron_eve.data.format.manifest import read_info
from tests.data.helpers import caption_row, encoded, picture

MORE = 16  # MiB that a million rows may take above ten thousand


@pytest.mark.slow
@pytest.mark.timeout(7200)  # 500 s of CPU on a busy machine
def test_memory_is_flat_from_ten_thousand_rows_to_a_million(tmp_path: Path, tokenizer_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(10):
        data = encoded(picture(120, 90, seed=number), "JPEG", quality=92)
        (photos / f"{number}.jpg").write_bytes(data)
        assert 1500 < len(data) < 3000
    few, many = (preprocess(tmp_path, photos, tokenizer_path, rows) for rows in (10_000, 1_000_000))
    for cost in (few, many):
        assert len(cost.workers) >= 2
        print(f"{cost.seconds:.0f} s, {cost.cpu:.0f} CPU s; parent {cost.parent}, worker {cost.worker}")
    assert many.parent.resident < few.parent.resident + MORE
    assert many.parent.anonymous < few.parent.anonymous + MORE
    assert many.worker.resident < few.worker.resident + MORE
    assert many.worker.anonymous < few.worker.anonymous + MORE


def preprocess(folder: Path, photos: Path, tokenizer_path: Path, rows: int) -> CommandCost:
    """What so many rows take, with two workers; their dataset is removed."""
    path, out = folder / f"{rows}.jsonl", folder / f"out{rows}"
    with path.open("w") as file:
        for number in range(rows):
            file.write(json.dumps(caption_row(number, f"{number % 10}.jpg")) + "\n")
    settings = {"input": path, "image_root": photos, "tokenizer_model": tokenizer_path, "workers": 2}
    try:
        cost = run_preprocess(settings | {"output_prefix": out / "set"}, memory=True)
        assert read_info(str(out / "set")).num_images == rows
    finally:
        shutil.rmtree(out, ignore_errors=True)
        path.unlink()
    return cost
