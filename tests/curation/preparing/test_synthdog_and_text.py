"""SynthDoG and FLAN's texts, from downloads with the published names and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.curation.preparing.synthdog import SynthDog
from megatron_eve.curation.preparing.text import Text
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped

QUESTION = (
    "<image>\nOCR this image section by section, from top to bottom, and left to right. Do not insert line breaks in "
    "the output text. If a word is split due to a line break in the image, use a space instead."
)


def truth(text: object) -> str:
    return json.dumps({"gt_parse": {"text_sequence": text}})


def page(seed: int, name: str, path: str, text: str, file: str) -> Record:
    return Record(
        id=name,
        source="synthdog",
        kind="conversation",
        images=[ImageFile(jpeg(seed), path)],
        turns=[{"from": "human", "value": QUESTION}, {"from": "gpt", "value": text}],
        meta={"source_file": file},
    )


class TestSynthDog:
    TEXTS = ("ut. The unsupe rvised equivalent of", None, "  ", "second page")

    def test_parquet_of_the_hub(self, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"image": {"bytes": jpeg(seed), "path": None}, "ground_truth": truth(text)}
            for seed, text in enumerate(self.TEXTS)
        ]
        rows[3]["image"]["path"] = "image_3.jpg"
        rows += [
            {"image": {"bytes": None, "path": "gone.jpg"}, "ground_truth": truth("no picture")},
            {"image": {"bytes": jpeg(5), "path": None}, "ground_truth": "{"},
            {"image": {"bytes": jpeg(6), "path": None}, "ground_truth": '{"gt_parse": []}'},
        ]
        (tmp_path / "in/data").mkdir(parents=True)
        name = "train-00000-of-00084-26dbc51f3d0903b9.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in/data" / name, row_group_size=2)
        validation = tmp_path / "in/data/validation-00000-of-00001.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), validation)
        found = run(SynthDog(tmp_path / "in"), tmp_path / "out", rows_per_shard=2)
        stem = name.removesuffix(".parquet")
        assert records(tmp_path / "out") == [
            page(0, f"{stem}-1", f"{stem}-1", "ut. The unsupe rvised equivalent of", name),
            page(3, f"{stem}-4", "image_3.jpg", "second page", name),
        ]
        assert [reason for _, reason in skipped(tmp_path / "out")] == [
            "value_not_text",
            "nothing_to_train",
            "parquet_row",
            "broken_json",
            "value_not_text",
        ]
        assert found.files_left_out == [f"data/{validation.name}"]

    def test_folders_as_the_generator_writes_them(self, tmp_path: Path) -> None:
        for split in ("train", "validation"):
            folder = tmp_path / "in/SynthDoG_en" / split
            folder.mkdir(parents=True)
            lines = [
                {"file_name": "image_0.jpg", "ground_truth": truth("a page")},
                {"file_name": "image_1.jpg", "ground_truth": truth("a page that is not there")},
                {"ground_truth": truth("no name")},
            ]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
            (folder / "image_0.jpg").write_bytes(jpeg(0))
        run(SynthDog(tmp_path / "in"), tmp_path / "out")
        path = "SynthDoG_en/train/image_0.jpg"
        assert records(tmp_path / "out") == [page(0, "image_0.jpg", path, "a page", "metadata.jsonl")]
        assert skipped(tmp_path / "out") == [("image_1.jpg", "image_missing"), (None, "questions_layout")]

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        with pytest.raises(
            DataError, match="synthdog expects parquet files with the columns image and ground"
        ):
            run(SynthDog(tmp_path / "in"), tmp_path / "out")
        (tmp_path / "in/train-0.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match=r"is not a complete parquet file .*: copy or download it again"):
            run(SynthDog(tmp_path / "in"), tmp_path / "out")


class TestText:
    def write(self, folder: Path) -> Path:
        folder.mkdir()
        rows: list[dict[str, Any]] = [
            {"inputs": "Translate to French: cat", "targets": "chat", "task": "wmt", "id": 7},
            {
                "id": "w1",
                "conversations": [
                    {"from": "human", "value": "Name a prime."},
                    {"from": "gpt", "value": "Two."},
                ],
            },
            {
                "messages": [
                    {"role": "user", "content": "And another?"},
                    {"role": "assistant", "content": "Three."},
                ]
            },
            {"text": "A text as it is."},
            {"inputs": "Unanswered?", "targets": " "},
            {"inputs": "Held out?", "targets": "yes", "split": "validation"},
            {
                "image": "1.jpg",
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
            },
            {"question": "Other keys?"},
            {"conversations": [{"from": "human", "value": "Empty?"}, {"from": "gpt", "value": ""}]},
        ]
        (folder / "flan.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "flan_test.jsonl").write_text(json.dumps(rows[0]))
        return folder

    def test_rows_of_all_layouts(self, tmp_path: Path) -> None:
        found = run(Text(self.write(tmp_path / "in")), tmp_path / "out")

        def conversation(identifier: str | None, question: str, answer: str, **meta: object) -> Record:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            return Record(identifier, "text", "conversation", [], turns, meta | {"source_file": "flan.jsonl"})

        assert records(tmp_path / "out") == [
            conversation("7", "Translate to French: cat", "chat", task="wmt"),
            conversation("w1", "Name a prime.", "Two."),
            conversation(None, "And another?", "Three."),
            Record(
                None,
                "text",
                "text",
                [],
                [{"from": "gpt", "value": "A text as it is."}],
                {"source_file": "flan.jsonl"},
            ),
        ]
        assert [reason for _, reason in skipped(tmp_path / "out")] == [
            "nothing_to_train",
            "eval_split",
            "text_with_pictures",
            "text_field",
            "nothing_to_train",
        ]
        assert found.files_left_out == ["flan_test.jsonl"]

    def test_rows_of_a_split_that_is_asked_for(self, tmp_path: Path) -> None:
        run(Text(self.write(tmp_path / "in"), allow_eval_splits=True), tmp_path / "out")
        assert len(records(tmp_path / "out")) == 6
