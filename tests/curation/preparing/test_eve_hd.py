"""EVE-HD's mixture: the published JSON, and the data sets that it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyarrow import parquet

from megatron_eve.curation.preparing.eve_hd import EveHd
from megatron_eve.data.errors import DataError
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing import test_ai2d, test_llava, test_short_questions
from tests.curation.preparing.helpers import jpeg, manifest, records, run, skipped
from tests.curation.preparing.test_llava import write_json, write_picture
from tests.curation.preparing.test_synthdog_and_text import truth
from tests.golden_dir import find_golden

PICTURES = (
    "ai2d/images/0.png",
    "chartqa/train/1.png",
    "chartqa/val/2.png",
    "docvqa/train/3.png",
    "dvqa/images/bar_train_00000001.png",
    "open_images/0a0bc91825468c45.jpg",
    "syndog/images/5.jpg",
    "Vision-Flan_vision-flan_191-task_1k/images_191task_1k/6.jpg",
    "coco/train2017/000000033471.jpg",
)


def row(number: int, picture: str) -> dict[str, object]:
    turns = [
        {"from": "human", "value": f"<image>\nQuestion {number}?"},
        {"from": "gpt", "value": f"A{number}."},
    ]
    return {"id": str(number), "image": picture, "conversations": turns}


class TestPublishedJson:
    def write(self, folder: Path) -> Path:
        text = {"id": "text", "conversations": row(0, "")["conversations"]}
        text["conversations"] = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
        rows = [row(number, picture) for number, picture in enumerate(PICTURES)]
        write_json(folder / "eve_instruct_mix1.8m.json", [*rows, text])
        for number, picture in enumerate(PICTURES):
            write_picture(folder / picture, number)
        return folder

    def test_rows_with_the_folder_of_their_picture(self, tmp_path: Path) -> None:
        run(EveHd(self.write(tmp_path / "in")), tmp_path / "out")
        folders = ["ai2d", "chartqa", None, "docvqa", "dvqa", "open_images", "syndog"]
        folders += ["Vision-Flan_vision-flan_191-task_1k", "coco"]
        expected = [
            Record(
                id=str(number),
                source="eve_hd",
                kind="conversation",
                images=[ImageFile(jpeg(number), picture)],
                turns=[
                    {"from": "human", "value": f"<image>\nQuestion {number}?"},
                    {"from": "gpt", "value": f"A{number}."},
                ],
                meta={"dataset": folder, "source_file": "eve_instruct_mix1.8m.json"},
            )
            for number, (picture, folder) in enumerate(zip(PICTURES, folders, strict=True))
            if folder is not None
        ]
        turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
        meta = {"source_file": "eve_instruct_mix1.8m.json"}
        assert records(tmp_path / "out") == [
            *expected,
            Record("text", "eve_hd", "conversation", [], turns, meta),
        ]
        assert skipped(tmp_path / "out") == [("2", "eval_split")]

    def test_the_mixture_as_published_with_its_validation_pictures(self, tmp_path: Path) -> None:
        run(EveHd(self.write(tmp_path / "in"), allow_eval_splits=True), tmp_path / "out")
        assert [record.id for record in records(tmp_path / "out")] == [*"012345678", "text"]


class TestParts:
    def write(self, folder: Path) -> Path:
        """The eight data sets, in folders named as their preparers."""
        test_llava.TestLlavaMix665k().write(folder / "llava_mix665k")
        (folder / "ai2d").mkdir()
        test_ai2d.write(folder / "ai2d")
        (folder / "synthdog/train").mkdir(parents=True)
        line = json.dumps({"file_name": "image_0.jpg", "ground_truth": truth("a page")})
        (folder / "synthdog/train/metadata.jsonl").write_text(line)
        (folder / "synthdog/train/image_0.jpg").write_bytes(jpeg(0))
        test_short_questions.TestDvqa().write(folder / "dvqa")
        chart = [{"imgname": "two_col_1.png", "query": "How many bars?", "label": "3"}]
        write_json(folder / "chartqa/train/train_human.json", chart)
        write_picture(folder / "chartqa/train/png/two_col_1.png", 1)
        test_short_questions.TestDocVqa().write(folder / "docvqa")
        write_json(folder / "vision_flan/annotation_191-task_1k.json", [row(1, "a.jpg")])
        write_picture(folder / "vision_flan/images_191task_1k/a.jpg", 1)
        write_json(folder / "bunny/finetune/bunny_695k.json", [row(2, "coco/train2017/2.jpg")])
        write_picture(folder / "bunny/finetune/images/coco/train2017/2.jpg", 2)
        return folder

    def test_rows_of_all_parts_with_their_licenses(self, tmp_path: Path) -> None:
        found = run(EveHd(self.write(tmp_path / "in")), tmp_path / "out", rows_per_shard=4)
        rows = [
            (one.source, one.id, None if not one.images else one.images[0].path)
            for one in records(tmp_path / "out")
        ]
        coco = "coco/train2017"
        assert rows == [
            ("llava_mix665k", "000000033471", f"llava_mix665k/{coco}/000000033471.jpg"),
            ("llava_mix665k", "0780739", "llava_mix665k/ocr_vqa/images/780739.jpg"),
            ("llava_mix665k", "wgByO4Y_0", None),
            ("ai2d", "0.png-0", "ai2d/ai2d/images/0.png"),
            ("ai2d", "0.png-1", "0_labels.png"),
            ("ai2d", "12.png-0", "ai2d/ai2d/images/12.png"),
            ("synthdog", "image_0.jpg", "synthdog/train/image_0.jpg"),
            ("dvqa", "bar_train_00000001.png", "dvqa/images/bar_train_00000001.png"),
            ("dvqa", "bar_train_00000002.png", "dvqa/images/bar_train_00000002.png"),
            ("chartqa", "two_col_1.png", "chartqa/train/png/two_col_1.png"),
            ("docvqa", "xnbl0037_1.png", "docvqa/documents/xnbl0037_1.png"),
            ("vision_flan", "1", "vision_flan/images_191task_1k/a.jpg"),
            ("bunny", "2", f"bunny/finetune/images/{coco}/2.jpg"),
        ]
        assert manifest(tmp_path / "out")["licenses"] == {"": 11, "GPL-3.0": 1, "Apache-2.0": 1}
        assert found.files_left_out == ["dvqa/val_easy_qa.json", "docvqa/val_v1.0_withQT.json"]

    def test_the_way_to_a_dataset_keeps_metadata_beside_the_right_row(self, tmp_path: Path) -> None:
        """OCR-VQA's file here is no picture: preprocessing leaves its row out, and the others keep theirs."""
        run(EveHd(self.write(tmp_path / "in")), tmp_path / "out", rows_per_shard=5)
        preprocess(
            PreprocessConfig(
                input=[str(tmp_path / "out" / "*.parquet")],
                tokenizer_model=str(find_golden("tokenize") / "tokenizer.model"),
                output_prefix=str(tmp_path / "set"),
                template="vicuna_v1",
                workers=1,
                image_settings={"image_size": 224, "teacher_size": 112},
            ),
            progress=False,
        )
        table = parquet.read_table(f"{tmp_path / 'set'}_meta.parquet").to_pylist()
        metas = [json.loads(one["meta"]) for one in table]
        assert [(one["source"], one["id"], one["license"]) for one in table] == [
            ("llava_mix665k", "000000033471", None),
            ("llava_mix665k", "wgByO4Y_0", None),
            ("ai2d", "0.png-0", None),
            ("ai2d", "0.png-1", None),
            ("ai2d", "12.png-0", None),
            ("synthdog", "image_0.jpg", None),
            ("dvqa", "bar_train_00000001.png", None),
            ("dvqa", "bar_train_00000002.png", None),
            ("chartqa", "two_col_1.png", "GPL-3.0"),
            ("docvqa", "xnbl0037_1.png", None),
            ("vision_flan", "1", None),
            ("bunny", "2", "Apache-2.0"),
        ]
        assert [meta.get("question_id") for meta in metas[6:8]] == [[11, 13], [12, 16]]
        assert [meta.get("abcLabel") for meta in metas[1:6]] == [None, False, True, False, None]

    def test_parts_that_are_not_there_are_named(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "in")
        (folder / "docvqa").rename(folder / "DocVQA")
        (folder / "bunny").rename(folder / "Bunny")
        message = r"has neither eve_instruct_mix1\.8m\.json nor the folders docvqa, bunny: add them, or prepare llava"
        with pytest.raises(DataError, match=message):
            run(EveHd(folder), tmp_path / "out")

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        with pytest.raises(
            DataError, match=r"eve_hd expects eve_instruct_mix1\.8m\.json and the pictures in"
        ):
            run(EveHd(tmp_path / "in"), tmp_path / "out")
