"""What is the same for all downloads: shards, workers, kills, settings, the manifest, and the way to a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from megatron_eve.curation.preparing.output import MANIFEST, PrepareFolder
from megatron_eve.curation.preparing.reasons import PREPARING_REASONS
from megatron_eve.curation.preparing.registry import PREPARERS
from megatron_eve.curation.preparing.sa1b import Sa1b
from megatron_eve.curation.preparing.splits import is_eval_split
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.reasons import REASONS
from tests.curation.preparing import test_laion, test_mmc4, test_sa1b
from tests.curation.preparing.helpers import jpeg, manifest, records, run, write_tar
from tests.data.helpers import ROOT
from tests.golden_dir import find_golden
from tools.prepare_data import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two archives of 12 and 11 pictures, and two keys without a picture."""
    for archive, numbers in enumerate((range(100, 112), range(200, 211))):
        rows: dict[str, bytes] = {}
        for number in numbers:
            rows |= test_sa1b.of(number)
        rows |= {f"sa_{archive}.json": b"{}"}
        write_tar(tmp_path / "in" / f"sa_{archive:06d}.tar", rows)
    return tmp_path / "in"


def digests(folder: Path) -> dict[str, str]:
    """All files of a folder by their content."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_shards_do_not_depend_on_the_number_of_workers(tmp_path: Path, source: Path) -> None:
    one = run(Sa1b(source), tmp_path / "one", rows_per_shard=4)
    # Of the seven shards the last has the key without a picture alone, so there is no file of it.
    assert one.shards == {f"0000{shard}.parquet": rows for shard, rows in enumerate((4, 4, 4, 3, 4, 4))}
    run(Sa1b(source), tmp_path / "three", rows_per_shard=4, workers=3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert [record.id for record in records(tmp_path / "one")] == [
        f"sa_{number}" for number in [*range(100, 112), *range(200, 211)]
    ]
    assert (one.rows_read, one.rows, one.skipped) == (25, 23, {"key_without_picture": 2})


def command(source: Path, output: Path, *more: str) -> list[str]:
    """The command in a process of its own, a shard for each row."""
    words = [
        "--source",
        str(source),
        "--output",
        str(output),
        "--rows-per-shard",
        "1",
        "--workers",
        "2",
        *more,
    ]
    return [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "sa1b", *words]


def workers_of(process: int) -> list[int]:
    """The processes of multiprocessing that a command started, without its resource tracker."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@pytest.mark.distributed
def test_the_same_command_after_a_kill_makes_the_same_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    rows: dict[str, bytes] = {"sa_0.json": b"{}"}
    for number in range(1, 100):
        rows |= {f"sa_{number}.jpg": jpeg(number), f"sa_{number}.json": b"{}"}
    write_tar(source / "sa_000000.tar", rows)
    run(Sa1b(source), tmp_path / "whole", rows_per_shard=1)
    process = subprocess.Popen(command(source, output), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 280
    while not list(output.glob("*.parquet")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # the parent and its workers
    process.wait()
    done = {int(file.stem): file.stat().st_mtime_ns for file in output.glob("counts/*.json")}
    assert len(done) < 100 and not (output / MANIFEST).exists()
    (output / "00000.parquet.partial").write_bytes(b"the beginning of a shard")
    second = subprocess.Popen(command(source, output), stderr=subprocess.PIPE, text=True)
    while len(list(output.glob("counts/*.json"))) <= len(done) and second.poll() is None:
        time.sleep(0.002)
    os.kill(workers_of(second.pid)[0], signal.SIGKILL)
    _, said = second.communicate(timeout=280)
    assert second.returncode == 2 and "error: a worker died, it may have run out of memory: use fewer" in said
    words = command(source, output)[2:]
    assert main(words) == 0
    assert digests(output) == digests(tmp_path / "whole")
    said = capsys.readouterr().out
    assert (
        "rows kept       99, in 99 shards" in said and "key_without_picture: no image or video among" in said
    )
    assert main(words) == 0 and "it was finished already: nothing to do" in capsys.readouterr().out
    assert main([*words, "--drop-license", "*nc*"]) == 2
    assert (
        f"error: --output {output} was begun with another --drop-license ([], now" in capsys.readouterr().err
    )


def test_shards_that_are_there_are_not_made_again(tmp_path: Path, source: Path) -> None:
    last = source / "sa_000001.tar"
    whole = last.read_bytes()
    place = whole.index(b"sa_206.jpg")  # a member's header
    last.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
    with pytest.raises(DataError, match=rf"sa_000001.tar is damaged at byte {place} "):
        run(Sa1b(source), tmp_path / "out", rows_per_shard=4)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")}
    assert len(made) == 4
    last.write_bytes(whole)
    assert run(Sa1b(source), tmp_path / "out", rows_per_shard=4).rows == 23
    assert {file: file.stat().st_mtime_ns for file in made} == made


def test_other_settings_are_refused_once_a_shard_is_there(tmp_path: Path, source: Path) -> None:
    settings = {"rows_per_shard": 4}
    with PrepareFolder(tmp_path / "out", settings):
        pass
    run(Sa1b(source), tmp_path / "out", rows_per_shard=5)  # without a shard they may change
    with pytest.raises(
        DataError, match=r"was begun with another --rows-per-shard \(5, now 6\): use the same again"
    ):
        run(Sa1b(source), tmp_path / "out", rows_per_shard=6)
    write_tar(source / "sa_000002.tar", test_sa1b.of(300))
    with pytest.raises(DataError, match=r"another --source \(names or sizes of its source files\)"):
        run(Sa1b(source), tmp_path / "out", rows_per_shard=5)


def test_a_command_that_was_ended_before_its_first_shard_was_complete(tmp_path: Path, source: Path) -> None:
    with PrepareFolder(tmp_path / "out", {"rows_per_shard": 10}):
        pass
    for name in ("00000.parquet", "00001.parquet.partial"):  # renamed and not counted, and half written
        (tmp_path / "out" / name).write_bytes(b"the beginning of a shard")
    found, whole = (run(Sa1b(source), tmp_path / name, rows_per_shard=10) for name in ("out", "whole"))
    assert found.rows == whole.rows and digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_commands_and_folders_of_other_files(tmp_path: Path, source: Path) -> None:
    with (
        PrepareFolder(tmp_path / "out", {}),
        pytest.raises(DataError, match="is being written by another command"),
    ):
        run(Sa1b(source), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds other files, such as notes.txt: name a new folder"):
        run(Sa1b(source), tmp_path / "other")
    with pytest.raises(DataError, match="is a file: name a folder"):
        run(Sa1b(source), tmp_path / "other" / "notes.txt")


def test_a_shard_that_has_gone(tmp_path: Path, source: Path) -> None:
    run(Sa1b(source), tmp_path / "out", rows_per_shard=10)
    (tmp_path / "out" / "00001.parquet").unlink()
    with pytest.raises(DataError, match=r"prepared.json names 00001.parquet, which is not there"):
        run(Sa1b(source), tmp_path / "out", rows_per_shard=10)


def test_a_download_of_which_no_row_can_be_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "sa_000000.tar", {"sa_1.json": b"{}", "sa_2.json": b"{}"})
    with pytest.raises(
        DataError, match=r"none of the 2 rows can be kept; 2 of them because key_without_picture: no"
    ):
        run(Sa1b(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists() and not list((tmp_path / "out").glob("*.parquet"))


def test_an_archive_that_breaks_off(tmp_path: Path, source: Path) -> None:
    last = source / "sa_000001.tar"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"sa_000001.tar breaks off: it does not end .*; copy or download it again"
    ):
        run(Sa1b(source), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_links_are_read_only_when_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "images").mkdir(parents=True)
    (tmp_path / "elsewhere.jpg").write_bytes(jpeg(1))
    (folder / "images" / "a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (folder / "images" / "b.jpg").write_bytes(jpeg(2))
    lines = [json.dumps(test_mmc4.document((f"{name}.jpg", 0), sentences=1)) for name in "ab"]
    (folder / "docs_shard_0_v3.jsonl").write_text("\n".join(lines))
    found = run(PREPARERS["mmc4_pairs"](folder), tmp_path / "out")
    assert found.skipped == {"image_outside_root": 1} and found.rows == 1
    assert run(PREPARERS["mmc4_pairs"](folder), tmp_path / "all", follow_links=True).rows == 2


@pytest.mark.parametrize(
    "name",
    ["val_easy_qa.json", "val2014/COCO_val2014_1.jpg", "validation-00000-of-00002.parquet", "test", "a/Test/1.png",
     "llava_vqav2_test-dev2015.jsonl", "minival.json", "dev-v1.0.json", "data/eval-00000.parquet"],
)  # fmt: skip
def test_names_of_test_and_validation_splits(name: str) -> None:
    assert is_eval_split(name)


@pytest.mark.parametrize(
    "name",
    ["train_qa.json", "sa_000000.tar", "latest.json", "contest/1.png", "valley.jpg", "train2017/1.jpg",
     "device.json", "evaluate.csv", "docs_shard_0_v3.jsonl"],
)  # fmt: skip
def test_names_of_other_files(name: str) -> None:
    assert not is_eval_split(name)


def test_metadata_stays_beside_the_right_row_of_the_dataset(tmp_path: Path) -> None:
    """Two downloads prepared, preprocessed with an opt-out list, and merged; row by row."""
    rows: dict[str, bytes] = {}
    for number in range(8):
        rows |= test_laion.members(f"{number:09d}", similarity=number / 10)
    rows["000000002.jpg"] = b"<html>404</html>"
    test_laion.download(tmp_path / "laion", 0, rows)
    (tmp_path / "mmc4_pairs" / "images").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "mmc4_pairs" / "images" / f"{number}.jpg").write_bytes(jpeg(20 + number))
    line = test_mmc4.document(("0.jpg", 1), ("1.jpg", 0), ("2.jpg", 2))
    (tmp_path / "mmc4_pairs" / "docs_shard_0_v3.jsonl").write_text(json.dumps(line))
    listed = ["000000004", f"{6:064x}", "http://pictures.example/1.jpg", hashlib.sha256(jpeg(7)).hexdigest()]
    (tmp_path / "out.txt").write_text("\n".join(listed))
    prefixes = []
    for name in ("laion", "mmc4_pairs"):
        run(PREPARERS[name](tmp_path / name), tmp_path / f"{name}_shards", rows_per_shard=3)
        prefixes.append(str(tmp_path / f"{name}_set"))
        preprocess(
            PreprocessConfig(
                input=[str(tmp_path / f"{name}_shards" / "*.parquet")],
                tokenizer_model=str(find_golden("tokenize") / "tokenizer.model"),
                output_prefix=prefixes[-1],
                template="document",
                workers=1,
                opt_out=str(tmp_path / "out.txt"),
                image_settings={"image_size": 224, "teacher_size": 112},
            ),
            progress=False,
        )
    merge_datasets(str(tmp_path / "both"), prefixes)
    found: list[dict[str, Any]] = [
        row for prefix in prefixes for row in parquet.read_table(f"{prefix}_meta.parquet").to_pylist()
    ]
    assert [(row["id"], row["source"], row["license"]) for row in found] == [
        *((f"{number:09d}", "laion", "?") for number in (0, 1, 3, 5)),
        *((f"docs_shard_0_v3:1:{number}", "mmc4_pairs", "ODC-BY") for number in (0, 2)),
    ]
    metas = [json.loads(row["meta"]) for row in found]
    assert [meta.get("similarity") for meta in metas] == [0.0, 0.1, 0.3, 0.5, None, None]
    assert [meta.get("raw_url") for meta in metas[4:]] == [f"http://pictures.example/{n}.jpg" for n in (0, 2)]
    assert [meta["source_file"] for meta in metas] == ["00000.tar"] * 4 + ["docs_shard_0_v3.jsonl"] * 2


def test_reasons_have_remedies_and_are_listed_in_the_documentation() -> None:
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    for name in PREPARING_REASONS.keys() - REASONS.keys():
        what, remedy = PREPARING_REASONS[name]
        assert what and remedy and not what.endswith(".") and not remedy.endswith("."), name
        assert f"`{name}`" in page, name


def test_preparers_are_in_the_documentation() -> None:
    page = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
    assert not [name for name in PREPARERS if f"| `{name}` |" not in page]


def test_the_manifest_says_what_became_of_all_rows(tmp_path: Path, source: Path) -> None:
    run(Sa1b(source), tmp_path / "out", rows_per_shard=10)
    content = manifest(tmp_path / "out")
    assert content["settings"]["name"] == "sa1b" and content["settings"]["rows_per_shard"] == 10
    assert content["shards"] == {"00000.parquet": 10, "00001.parquet": 9, "00002.parquet": 4}
    (first, second) = content["skipped_first"]["key_without_picture"]
    assert (first["row"], second["row"]) == (13, 12) and Path(first["file"]).name == "sa_000000.tar"
    assert not (tmp_path / "out" / "counts").exists() and not (tmp_path / "out" / "preparing.json").exists()
