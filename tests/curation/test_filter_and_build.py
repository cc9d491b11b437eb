"""The stages filter and build: which rows are dropped and why, what the hashes are, and the chain to a dataset."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import imagehash
import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.curation.captions_of_records import ORIGINAL_CAPTION, caption_of, with_caption
from megatron_eve.curation.command import curate
from megatron_eve.curation.inputs import Inputs
from megatron_eve.curation.reasons import CURATION_REASONS, find_reason
from megatron_eve.curation.rules import PictureRules
from megatron_eve.curation.stages.build import BuildStage
from megatron_eve.curation.stages.filter import FilterStage
from megatron_eve.curation.text_rules import CaptionRules
from megatron_eve.curation.work import Work
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.schema import ImageFile, Record
from megatron_eve.data.sources.parquet import ARROW_SCHEMA
from tests.curation.shards import jpeg, pair, photo, write_shards
from tests.golden_dir import find_golden

LARGE = photo(500, 460, seed=1)
FINE = FilterStage(PictureRules(), CaptionRules(max_words=20, max_repeated=0.3))


def begun(folder: Path, *shards: list[Record]) -> Work:
    """A work folder of shards, in which no stage has run."""
    pattern = write_shards(folder / "in", shards)
    work = Work(folder / "work", Inputs.of([pattern]))
    work.folder.mkdir()
    work.inputs.write(work.folder)
    return work


def test_each_row_gets_its_reason(tmp_path: Path) -> None:
    """One row of each kind, in one shard; only pairs are judged by size and caption."""
    small, turns = jpeg(photo(448, 600, seed=2)), [{"from": "human", "value": "<image>\nWhat is it?"}]
    rows = {
        "fine": pair("fine", LARGE, "A cloud of many colours."),
        "no caption": pair("no caption", LARGE, ""),
        "small": pair("small", small, "A cloud."),
        "long": pair("long", LARGE, "word " * 21),
        "repetitive": pair("repetitive", LARGE, "a cloud of many " * 4),
        "damaged": pair("damaged", jpeg(LARGE)[:2000], "A cloud."),
        "web page": pair("web page", b"<html>", "A cloud."),
        "path": replace(pair("path", b"", ""), images=[ImageFile(None, "cloud.jpg")]),
        "turns": replace(pair("turns", LARGE, ""), turns=[{"from": "cat", "value": ""}]),
        "small in a conversation": Record(
            "c", "test", "conversation", [ImageFile(small)], [*turns, {"from": "gpt", "value": "No. " * 30}]
        ),
        "damaged in a conversation": Record(
            "d", "test", "conversation", [ImageFile(small[:900])], [*turns, {"from": "gpt", "value": "No."}]
        ),
        "text": Record("t", "test", "text", [], [{"from": "gpt", "value": "word " * 30}]),
        "frames": Record(
            "v", "test", "pair", [ImageFile(jpeg(LARGE))] * 2, [{"from": "gpt", "value": "<image><image>A film."}]
        ),
        "drawn": Record(
            "g",
            "test",
            "generation",
            [ImageFile(jpeg(LARGE))],
            [{"from": "human", "value": "word " * 21}, {"from": "gpt", "value": "<image>"}],
        ),
    }  # fmt: skip
    work = begun(tmp_path, list(rows.values()))
    (work.folder / "filter").mkdir()
    counts = FINE.run(work, 0)
    table = work.read_table("filter", 0).to_pylist()
    assert [row["row"] for row in table] == list(range(len(rows)))
    assert [row["id"] for row in table] == [record.id for record in rows.values()]
    assert {name: row["reason"] for name, row in zip(rows, table, strict=True) if row["reason"]} == {
        "small": "too_small",
        "long": "caption_too_long",
        "repetitive": "caption_repetitive",
        "damaged": "image_damaged",
        "web page": "image_format",
        "path": "picture_not_in_shard",
        "turns": "unknown_role",
        "damaged in a conversation": "image_damaged",
        "drawn": "caption_too_long",
    }
    assert counts["kept"] == 5 and counts.total() == len(rows)
    of = dict(zip(rows, table, strict=True))
    data = rows["fine"].images[0].data or b""
    assert of["fine"]["sha256"] == hashlib.sha256(data).digest()
    assert (of["fine"]["width"], of["fine"]["height"]) == (500, 460)
    bits = imagehash.phash(photo(500, 460, seed=1)).hash.ravel()
    assert int(of["fine"]["phash"]) ^ int("".join(map(str, bits.astype(int))), 2) in {
        0,
        *(1 << n for n in range(64)),
    }
    assert of["small"]["detail"] == "448 x 600 pixels" and of["small"]["width"] == 448
    assert of["small"]["phash"] is None
    assert all(of[name][key] is None for name in ("text", "frames") for key in ("sha256", "phash", "width"))
    assert work.kept_rows(0, "filter").tolist() == list(range(len(rows)))


def test_rows_that_cannot_be_read_are_dropped_and_counted(tmp_path: Path) -> None:
    """A row of an unknown kind, and one whose id is not UTF-8; the others are kept."""
    fine = pair("fine", LARGE, "A cloud.")
    work = begun(tmp_path, [fine, fine, fine])
    path = work.inputs.files[0]
    table = parquet.read_table(path)
    kinds = pyarrow.array(["pair", "picture", "pair"])
    table = table.set_column(table.column_names.index("kind"), "kind", kinds)
    parquet.write_table(table.cast(ARROW_SCHEMA), path)
    work = Work(work.folder, Inputs.of([str(path)]))
    (work.folder / "filter").mkdir()
    assert FINE.run(work, 0) == {"kept": 2, "parquet_row": 1}
    assert work.read_table("filter", 0)["detail"].to_pylist()[1].startswith("kind is 'picture', not one of")


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"tar")
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no end")
    for name, says in (
        ("a.tar", "curation reads parquet shards of records"),
        ("b.parquet", "has the columns x"),
        ("c.parquet", "is not a complete parquet file"),
        ("nothing.parquet", "cannot open .*nothing.parquet"),
        ("*.none", "no file matches this pattern"),
    ):
        with pytest.raises(DataError, match=says):
            Inputs.of([str(tmp_path / name)])


def test_another_caption_and_the_old_one_beside_it() -> None:
    record = pair("a", b"x", "old", license="CC0")
    new = with_caption(record, "A new one.")
    assert new.turns == [{"from": "gpt", "value": "<image>A new one."}]
    assert new.meta == {"license": "CC0", ORIGINAL_CAPTION: "old"} and caption_of(new) == "A new one."
    assert with_caption(pair("a", b"x", ""), "A new one.").meta == {}
    drawn = Record(
        "g", "t", "generation", [], [{"from": "human", "value": "old"}, {"from": "gpt", "value": "<image>"}]
    )
    assert with_caption(drawn, "new").turns == [{"from": "human", "value": "new"}, drawn.turns[1]]
    assert caption_of(Record("t", "t", "text", [], [{"from": "gpt", "value": "text"}])) is None


def test_every_reason_is_explained() -> None:
    for name in CURATION_REASONS:
        assert find_reason(name).what and find_reason(name).remedy
    assert find_reason("image_damaged").what


def test_from_shards_to_a_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three sources with one damaged or small row each; a table of captions; metadata beside the right row."""
    shards = [
        [
            pair(f"{source}-{row}", photo(500, 300 if row == 1 else 460, seed=10 * number + row), f"Old {row}.",
                 license=f"L{number}", row=row)
            for row in range(3)
        ]
        for number, source in enumerate(("laion", "coyo", "sa1b"))
    ]  # fmt: skip
    shards[2][2] = pair("sa1b-2", b"no picture", "Old 2.", license="L2", row=2)
    shards.append([pair("small", photo(100, 100, seed=0), "All of this shard is dropped.")])
    folder, pattern = tmp_path / "work", write_shards(tmp_path / "in", shards)
    assert curate(FilterStage(PictureRules(), CaptionRules()), folder, patterns=[pattern], workers=2) == 0
    out, _ = capfd.readouterr()
    assert [line.split(maxsplit=2)[-1] for line in out.splitlines()[1:3]] == ["10", "5 (50.0%)"]
    assert "4  too_small: the width or height" in out and "1  image_format: not an image" in out
    page = (folder / "filter" / "dropped.html").read_text()
    assert page.count("<section>") == 5 and page.count("<img") == 4
    assert "too_small: 4 rows (40.0%)" in page and "500 x 300 pixels" in page and "All of this shard" in page
    _write_captions(folder)
    assert curate(BuildStage(), folder, workers=2) == 0
    assert "5, of which 2 have a new caption" in capfd.readouterr().out
    assert sorted(path.name for path in (folder / "build").glob("0*")) == [
        "00000.parquet", "00001.parquet", "00002.parquet", "00003.parquet.empty",
    ]  # fmt: skip
    assert curate(BuildStage(), folder, list_unfinished=True) == 0
    assert capfd.readouterr().out == "none\n"
    info = preprocess(
        PreprocessConfig(
            input=[str(folder / "build" / "*.parquet")],
            tokenizer_model=str(find_golden("tokenize") / "tokenizer.model"),
            output_prefix=str(tmp_path / "set"),
            workers=1,
        )
    )
    assert info.num_samples == 5
    dataset = open_dataset(str(tmp_path / "set"))
    assert len(dataset) == 5
    metas = parquet.read_table(tmp_path / "set_meta.parquet").to_pylist()
    found = [(row["id"], json.loads(row["meta"])) for row in metas]
    assert found == [
        ("laion-0", {"license": "L0", "row": 0, ORIGINAL_CAPTION: "Old 0."}),
        ("laion-2", {"license": "L0", "row": 2}),
        ("coyo-0", {"license": "L1", "row": 0, ORIGINAL_CAPTION: "Old 0."}),
        ("coyo-2", {"license": "L1", "row": 2}),
        ("sa1b-0", {"license": "L2", "row": 0}),
    ]


def _write_captions(folder: Path) -> None:
    """A finished stage caption, as its own code would write it: new captions for the first rows of two shards."""
    from megatron_eve.curation.stage_record import StageRecord

    work = Work.open(folder)
    first = StageRecord.read(work, "filter")
    assert first is not None
    made_from = {**first.made_from, "filter": first.digest}
    made = replace(first, stage="caption", settings={}, made_from=made_from)
    for name in ("completions", "stats"):
        (folder / "caption" / "logs" / name).mkdir(parents=True)
    made.write(work)
    for shard in range(len(work.inputs)):
        rows = work.kept_rows(shard, "caption")
        captions = [f"New {row} of {shard}." for row in rows.tolist()]
        reasons = [None] * len(rows)
        if shard == 2 or not len(rows):
            rows, captions, reasons = rows[:0], [], []
        keep = min(len(rows), 1)
        table = {
            "row": rows[:keep],
            "caption": captions[:keep],
            "reason": pyarrow.array(reasons[:keep], pyarrow.string()),
        }
        work.write_table("caption", shard, pyarrow.table(table))
        (folder / "caption" / "logs" / "completions" / f"{shard:05d}").touch()
        (folder / "caption" / "logs" / "stats" / f"{shard:05d}.json").write_text("[]")
