"""DVQA, ChartQA and DocVQA, from downloads with the published names and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from megatron_eve.curation.preparing.chartqa import ChartQa
from megatron_eve.curation.preparing.docvqa import DocVqa
from megatron_eve.curation.preparing.dvqa import Dvqa
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, records, run, skipped

SHORT = "\nAnswer the question using a single word or phrase."


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))


def asked(question: str, answer: str, first: bool = False) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": ("<image>\n" if first else "") + question + SHORT},
        {"from": "gpt", "value": answer},
    ]


def of_chart(picture: str, question: str, answer: object, number: int) -> dict[str, Any]:
    return {
        "image": picture,
        "question": question,
        "answer": answer,
        "question_type": "structure",
        "bbox_answer": [],
        "question_id": number,
    }


class TestDvqa:
    def write(self, folder: Path) -> Path:
        write_json(
            folder / "train_qa.json",
            [
                of_chart("bar_train_00000001.png", "How many bars are there?", "two", 11),
                of_chart("bar_train_00000002.png", "What is the value of cat?", "7", 12),
                of_chart("bar_train_00000001.png", "What is the label of the first bar?", "dog", 13),
                of_chart("bar_train_00000001.png", "Blank?", " ", 14),
                of_chart("bar_train_00000003.png", "No picture?", "yes", 15),
                {"image": "bar_train_00000002.png", "answer": "no"},
                of_chart("bar_train_00000002.png", "What is the sum of the bars?", 12, 16),
            ],
        )
        write_json(folder / "val_easy_qa.json", [of_chart("bar_val_easy_00000001.png", "Q?", "A", 1)])
        write_picture(folder / "images/bar_train_00000001.png", 1)
        write_picture(folder / "images/bar_train_00000002.png", 2)
        write_picture(folder / "images/bar_val_easy_00000001.png", 3)
        return folder

    def test_questions_of_a_picture_are_turns_of_one_conversation(self, tmp_path: Path) -> None:
        found = run(Dvqa(self.write(tmp_path / "in")), tmp_path / "out", rows_per_shard=2)
        assert records(tmp_path / "out") == [
            Record(
                id="bar_train_00000001.png",
                source="dvqa",
                kind="conversation",
                images=[ImageFile(jpeg(1), "bar_train_00000001.png")],
                turns=[
                    *asked("How many bars are there?", "two", first=True),
                    *asked("What is the label of the first bar?", "dog"),
                ],
                meta={"question_id": [11, 13], "source_file": "train_qa.json"},
            ),
            Record(
                id="bar_train_00000002.png",
                source="dvqa",
                kind="conversation",
                images=[ImageFile(jpeg(2), "bar_train_00000002.png")],
                turns=[
                    *asked("What is the value of cat?", "7", first=True),
                    *asked("What is the sum of the bars?", "12"),
                ],
                meta={"question_id": [12, 16], "source_file": "train_qa.json"},
            ),
        ]
        assert skipped(tmp_path / "out") == [
            (None, "nothing_to_train"),
            (None, "questions_layout"),
            ("bar_train_00000003.png", "image_missing"),
        ]
        assert found.files_left_out == ["val_easy_qa.json"]

    def test_only_files_of_validation_splits(self, tmp_path: Path) -> None:
        (self.write(tmp_path / "in") / "train_qa.json").unlink()
        with pytest.raises(
            DataError, match=r"has files of test or validation splits only, such as val_easy_qa"
        ):
            run(Dvqa(tmp_path / "in"), tmp_path / "out")
        run(Dvqa(tmp_path / "in", allow_eval_splits=True), tmp_path / "out")
        assert [record.id for record in records(tmp_path / "out")] == ["bar_val_easy_00000001.png"]

    def test_no_charts(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in" / "train_qa.json", [])
        with pytest.raises(DataError, match=r"has no images/: dvqa expects train_qa.json, and the charts in"):
            run(Dvqa(tmp_path / "in"), tmp_path / "out")


class TestChartQa:
    EXPECTED = (
        (
            "two_col_1.png",
            1,
            [("How many bars?", "3", "human"), ("What is the peak in 2015?", "41.5", "augmented")],
        ),
        ("multi_2.png", 2, [("Is it rising?", "Yes", "human")]),
    )

    def expected(self, prefix: str, file: str) -> list[Record]:
        """The rows, written down above."""
        return [
            Record(
                id=name,
                source="chartqa",
                kind="conversation",
                images=[ImageFile(jpeg(seed), f"{prefix}{name}")],
                turns=[
                    turn
                    for number, (question, answer, _) in enumerate(questions)
                    for turn in asked(question, answer, first=number == 0)
                ],
                meta={"type": [kind for _, _, kind in questions], "source_file": file, "license": "GPL-3.0"},
            )
            for name, seed, questions in self.EXPECTED
        ]

    def test_json_files_of_people_and_of_the_generator(self, tmp_path: Path) -> None:
        folder = tmp_path / "in" / "ChartQA Dataset"
        human = [
            {"imgname": "two_col_1.png", "query": "How many bars?", "label": "3"},
            {"imgname": "multi_2.png", "query": "Is it rising?", "label": "Yes"},
        ]
        write_json(folder / "train/train_human.json", human)
        generated = [{"imgname": "two_col_1.png", "query": "What is the peak in 2015?", "label": "41.5"}]
        write_json(folder / "train/train_augmented.json", generated)
        write_json(folder / "val/val_human.json", human)
        write_json(folder / "test/test_human.json", human)
        for split in ("train", "val", "test"):
            write_picture(folder / split / "png/two_col_1.png", 1)
            write_picture(folder / split / "png/multi_2.png", 2)
        found = run(ChartQa(tmp_path / "in"), tmp_path / "out")
        prefix = "ChartQA Dataset/train/png/"
        assert records(tmp_path / "out") == self.expected(prefix, "train_human.json")
        assert len(found.files_left_out) == 2

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"imgname": name, "query": query, "label": label, "type": kind, "image": jpeg(seed)}
            for name, seed, query, label, kind in [
                ("two_col_1.png", 1, "How many bars?", "3", "human"),
                ("multi_2.png", 2, "Is it rising?", "Yes", "human"),
                ("two_col_1.png", 1, "What is the peak in 2015?", "41.5", "augmented"),
            ]
        ]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_parquet_with_the_picture_in_each_row(self, tmp_path: Path, workers: int) -> None:
        (tmp_path / "in/data").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(self.rows())
        parquet.write_table(table, tmp_path / "in/data/train-00000-of-00001.parquet", row_group_size=2)
        parquet.write_table(table, tmp_path / "in/data/test-00000-of-00001.parquet")
        found = run(ChartQa(tmp_path / "in"), tmp_path / "out", workers=workers, rows_per_shard=1)
        assert records(tmp_path / "out") == self.expected("", "train-00000-of-00001.parquet")
        assert found.files_left_out == ["data/test-00000-of-00001.parquet"]

    def test_parquet_of_another_data_set(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        parquet.write_table(pyarrow.table({"query": ["a"]}), tmp_path / "in/train.parquet")
        with pytest.raises(
            DataError, match=r"train\.parquet has no column imgname, label, type, image \(it has"
        ):
            run(ChartQa(tmp_path / "in"), tmp_path / "out")


class TestDocVqa:
    def page(self, question: int, text: str, answers: object, **others: object) -> dict[str, Any]:
        return {
            "questionId": question,
            "question": text,
            "question_types": ["form"],
            "image": "documents/xnbl0037_1.png",
            "docId": 279,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": "train",
        } | others

    def write(self, folder: Path) -> Path:
        rows = [
            self.page(337, "What is the date in this letter?", ["1/8/93", "1/8/1993"]),
            self.page(338, "Who is it to?", ["Paul"], question_types=["handwritten", "form"]),
            self.page(339, "No answers?", []),
            self.page(340, "Held out?", ["yes"], data_split="val"),
            self.page(341, "Which page?", ["2"], image="documents/xnbl0037_2.png"),
        ]
        write_json(
            folder / "train_v1.0_withQT.json",
            {"dataset_name": "docvqa", "dataset_split": "train", "dataset_version": "1.0", "data": rows},
        )
        write_json(folder / "val_v1.0_withQT.json", {"data": rows})
        write_picture(folder / "documents/xnbl0037_1.png", 1)
        return folder

    def test_the_first_answer_of_each_question_of_a_page(self, tmp_path: Path) -> None:
        run(DocVqa(self.write(tmp_path / "in")), tmp_path / "out")
        assert records(tmp_path / "out") == [
            Record(
                id="xnbl0037_1.png",
                source="docvqa",
                kind="conversation",
                images=[ImageFile(jpeg(1), "documents/xnbl0037_1.png")],
                turns=[
                    *asked("What is the date in this letter?", "1/8/93", first=True),
                    *asked("Who is it to?", "Paul"),
                ],
                meta={
                    "docId": 279,
                    "ucsf_document_id": "xnbl0037",
                    "ucsf_document_page_no": "1",
                    "questionId": [337, 338],
                    "question_types": [["form"], ["handwritten", "form"]],
                    "source_file": "train_v1.0_withQT.json",
                },
            )
        ]
        assert skipped(tmp_path / "out") == [
            (None, "questions_layout"),
            (None, "eval_split"),
            ("xnbl0037_2.png", "image_missing"),
        ]

    def test_files_of_another_layout(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in/train_v1.0_withQT.json", {"rows": []})
        with pytest.raises(DataError, match=r"has no documents/: docvqa expects train_v1.0_withQT.json"):
            run(DocVqa(tmp_path / "in"), tmp_path / "out")
        (tmp_path / "in/documents").mkdir()
        with pytest.raises(DataError, match="has no list 'data': it is not a file of DocVQA's questions"):
            run(DocVqa(tmp_path / "in"), tmp_path / "out")
        (tmp_path / "in/train_v1.0_withQT.json").write_text('{"data": [')
        with pytest.raises(DataError, match=r"is damaged .*: download it again"):
            run(DocVqa(tmp_path / "in"), tmp_path / "other")
