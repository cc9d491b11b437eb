"""LAION, from shards of img2dataset in their published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_eve.curation.preparing.laion import Laion
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped, write_tar


def beside(key: str, **more: Any) -> dict[str, Any]:
    """The JSON of a picture as img2dataset writes it."""
    return {
        "url": f"https://pictures.example/{key}.jpg", "caption": f"a car, number {key}", "key": key,
        "status": "success", "error_message": None, "width": 32, "height": 24, "original_width": 640,
        "original_height": 480, "exif": "{}", "sha256": f"{int(key):064x}", "NSFW": "UNLIKELY", "similarity": 0.31,
        "LICENSE": "?", "punsafe": 0.01, "pwatermark": 0.2, "aesthetic": 5.5, **more,
    }  # fmt: skip


def members(key: str, **more: Any) -> dict[str, bytes]:
    """The three members of a picture."""
    fields = beside(key, **more)
    return {
        f"{key}.jpg": jpeg(int(key)),
        f"{key}.txt": fields["caption"].encode(),
        f"{key}.json": json.dumps(fields).encode(),
    }


def download(folder: Path, number: int, rows: dict[str, bytes], failed: int = 0) -> None:
    """A shard with its statistics."""
    write_tar(folder / f"{number:05d}.tar", rows)
    stats = {"count": 3, "successes": 3 - failed, "failed_to_download": failed, "failed_to_resize": 0,
             "duration": 1.0, "start_time": 0.0, "end_time": 1.0, "status_dict": {"success": 3 - failed}}  # fmt: skip
    (folder / f"{number:05d}_stats.json").write_text(json.dumps(stats))


def expected(key: str, name: str, file: str) -> Record:
    meta = {
        "url": f"https://pictures.example/{key}.jpg", "width": 32, "height": 24, "original_width": 640,
        "original_height": 480, "sha256": f"{int(key):064x}", "NSFW": "UNLIKELY", "similarity": 0.31,
        "LICENSE": "?", "punsafe": 0.01, "pwatermark": 0.2, "aesthetic": 5.5, "source_file": file,
    }  # fmt: skip
    turns = [{"from": "gpt", "value": f"<image>a car, number {key}"}]
    return Record(name, "laion", "pair", [ImageFile(jpeg(int(key)), f"{key}.jpg")], turns, meta)


def test_pairs_with_their_metadata_and_dead_links_counted(tmp_path: Path) -> None:
    failed = members("000000002", status="failed_to_download", error_message="HTTP Error 404: Not Found")
    download(tmp_path / "in", 0, members("000000000") | members("000000001") | failed, failed=2)
    download(tmp_path / "in", 1, members("000010000"), failed=1)
    found = run(Laion(tmp_path / "in"), tmp_path / "out")
    assert records(tmp_path / "out") == [
        expected("000000000", "000000000", "00000.tar"),
        expected("000000001", "000000001", "00000.tar"),
        expected("000010000", "000010000", "00001.tar"),
    ]
    assert skipped(tmp_path / "out") == [("000000002", "download_failed")]
    assert found.dead_links == 3 and found.licenses == {"?": 3}


def test_keys_of_two_output_folders_stay_apart(tmp_path: Path) -> None:
    for part in ("part0", "part1"):
        download(tmp_path / "in" / part, 0, members("000000000"))
    run(Laion(tmp_path / "in"), tmp_path / "out")
    assert [record.id for record in records(tmp_path / "out")] == ["part0/000000000", "part1/000000000"]


def test_rows_are_left_out_by_license_id_url_and_either_digest(tmp_path: Path) -> None:
    import hashlib

    rows: dict[str, bytes] = {}
    for number in range(6):
        rows |= members(f"{number:09d}", LICENSE="CC-BY-NC-2.0" if number == 5 else "?")
    download(tmp_path / "in", 0, rows)
    listed = tmp_path / "opt_out.txt"
    # an id, a URL, the digest of the file that was downloaded, and that of the file in the shard
    lines = [
        "000000000",
        "https://pictures.example/000000001.jpg",
        f"{2:064x}",
        hashlib.sha256(jpeg(3)).hexdigest(),
    ]
    listed.write_text("\n".join(["# asked to be left out", *lines]) + "\n")
    found = run(Laion(tmp_path / "in"), tmp_path / "out", opt_out=str(listed), drop_license=("*-nc-*",))
    assert [record.id for record in records(tmp_path / "out")] == ["000000004"]
    assert found.skipped == {"opted_out": 4, "license_dropped": 1}
