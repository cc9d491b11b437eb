"""What is kept of a row beside its sample, and rows that are left out by it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megatron_eve.data.errors import DataError
from megatron_eve.data.format import metadata
from megatron_eve.data.format.manifest import read_info
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.format.metadata import META, META_SCHEMA
from megatron_eve.data.preprocessing.summary import format_summary
from tests.data.helpers import MakeConfig, caption_row, run, skipped_rows

LICENSES = ["CC-BY-NC-4.0", "CC0", None, " cc0 ", "CC-BY-SA"]


def rows() -> list[dict[str, Any]]:
    """The third has no license, and the fourth no picture that is there."""
    made = []
    for number, license in enumerate(LICENSES):
        row = caption_row(number, "ok.jpg" if number != 3 else "no.jpg", f"Number {number}.")
        made.append({**row, "License": license, "url": f"http://x/{number}", "score": number / 2})
    return made


def table(prefix: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parquet.read_table(prefix + META).to_pylist()
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("storage", ["encoded", "pixels"])
def test_each_sample_has_its_row(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, workers: int, storage: str
) -> None:
    monkeypatch.setattr(metadata, "_ROWS", 3)
    config = make_config(rows(), workers=workers, image_storage=storage)
    info = run(config)
    found = table(config.output_prefix)
    assert parquet.read_schema(config.output_prefix + META).equals(META_SCHEMA)
    assert [row["id"] for row in found] == ["id0", "id1", "id2", "id4"]
    assert [row["license"] for row in found] == ["CC-BY-NC-4.0", "CC0", None, "CC-BY-SA"]
    assert json.loads(found[3]["meta"]) == {"License": "CC-BY-SA", "url": "http://x/4", "score": 2.0}
    assert {Path(row["source"]).name for row in found} == {"data.json"}
    assert info.licenses == {"CC-BY-NC-4.0": 1, "CC0": 1, "CC-BY-SA": 1}
    assert "license           1 CC0\n" in format_summary(info, "x")


def test_merged_datasets_count_together(make_config: MakeConfig, tmp_path: Path) -> None:
    prefixes = [str(tmp_path / name) for name in "ab"]
    for prefix in prefixes:
        run(make_config(rows(), output_prefix=prefix))
    assert merge_datasets(str(tmp_path / "all"), prefixes).licenses["CC0"] == 2
    assert read_info(str(tmp_path / "all")).licenses == {"CC-BY-NC-4.0": 2, "CC0": 2, "CC-BY-SA": 2}


def test_rows_are_dropped_by_license(make_config: MakeConfig) -> None:
    config = make_config(rows(), drop_license=("*-nc-*", "cc0"))
    info = run(config)
    assert info.skipped == {"license_dropped": 3}
    assert [(row["id"], row["detail"]) for row in skipped_rows(config)] == [
        ("id0", "CC-BY-NC-4.0"), ("id1", "CC0"), ("id3", "cc0"),
    ]  # fmt: skip
    assert [row["id"] for row in table(config.output_prefix)] == ["id2", "id4"]


@pytest.mark.parametrize("storage", ["encoded", "pixels"])
def test_rows_that_somebody_wants_out(make_config: MakeConfig, tmp_path: Path, storage: str) -> None:
    made = rows()
    (tmp_path / "photos" / "no.jpg").write_bytes((tmp_path / "photos" / "ok.jpg").read_bytes() + b"more")
    digest = hashlib.sha256((tmp_path / "photos" / "no.jpg").read_bytes()).hexdigest()
    out = tmp_path / "out.txt"
    out.write_text(f"# asked for\nid0\n\n http://x/1 \n{digest.upper()}\n")
    config = make_config(made, opt_out=str(out), image_storage=storage)
    info = run(config)
    assert info.skipped == {"opted_out": 3}
    assert [row["detail"] for row in skipped_rows(config)] == ["id0", "http://x/1", digest]
    assert [row["id"] for row in table(config.output_prefix)] == ["id2", "id4"]


def test_a_file_of_those_who_opted_out_that_is_not_there(make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match=r"--opt-out nowhere.txt cannot be read .*: name a text file"):
        run(make_config(rows(), opt_out="nowhere.txt"))


def test_many_licenses_do_not_fill_the_manifest(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "_MOST_LICENSES", 2)
    made = [{**caption_row(n, "ok.jpg"), "license": f"L{n % 4}"} for n in range(8)]
    assert run(make_config(made)).licenses == {"L0": 2, "L1": 2, "other": 4}


def test_odd_values_are_no_obstacle(make_config: MakeConfig) -> None:
    made = {**caption_row(1, "ok.jpg"), "license": "\ud83d", "note": "\ude00", "deep": {"urls": ["u"]}}
    config = make_config([{**made, "id": "\ud83d"}])
    assert run(config).licenses == {"?": 1}
    assert table(config.output_prefix)[0]["id"] == "?"
