"""LLaVA-558K, mix-665K, Vision-Flan and Bunny-695K, from downloads with the published names and keys."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.curation.preparing.llava import Bunny, Llava558k, LlavaMix665k, VisionFlan
from megatron_eve.data.errors import DataError
from megatron_eve.data.schema import ImageFile, Record
from tests.curation.preparing.helpers import jpeg, manifest, records, run, skipped

CAPTIONS = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    },
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
            {"from": "gpt", "value": "a grey watch with an army style strap"},
        ],
    },
]
URLS = [
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "blip_caption": "a grey watch with an army style strap",
        "url": "https://example.org/watch.jpg",
    }
]


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))


def captions(urls: bool) -> list[Record]:
    """The two rows of LLaVA-558K, written down."""
    file = "blip_laion_cc_sbu_558k.json"
    return [
        Record(
            id="004539375",
            source="llava_558k",
            kind="conversation",
            images=[ImageFile(jpeg(1), "00453/004539375.jpg")],
            turns=[
                {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
                {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
            ],
            meta={"source_file": file},
        ),
        Record(
            id="002239345",
            source="llava_558k",
            kind="conversation",
            images=[ImageFile(jpeg(2), "00223/002239345.jpg")],
            turns=[
                {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
                {"from": "gpt", "value": "a grey watch with an army style strap"},
            ],
            meta={"url": "https://example.org/watch.jpg", "source_file": file}
            if urls
            else {"source_file": file},
        ),
    ]


class TestLlava558k:
    def test_pictures_that_were_unpacked(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in" / "blip_laion_cc_sbu_558k.json", CAPTIONS)
        write_picture(tmp_path / "in/images/00453/004539375.jpg", 1)
        write_picture(tmp_path / "in/images/00223/002239345.jpg", 2)
        run(Llava558k(tmp_path / "in"), tmp_path / "out")
        assert records(tmp_path / "out") == captions(urls=False)

    @pytest.mark.parametrize("workers", [1, 2])
    def test_pictures_of_the_archive_and_urls_beside_the_right_row(
        self, tmp_path: Path, workers: int
    ) -> None:
        write_json(tmp_path / "in" / "blip_laion_cc_sbu_558k.json", CAPTIONS)
        write_json(tmp_path / "in" / "blip_laion_cc_sbu_558k_meta.json", URLS)
        with zipfile.ZipFile(tmp_path / "in" / "images.zip", "w") as archive:
            archive.writestr("00223/002239345.jpg", jpeg(2))
            archive.writestr("00453/004539375.jpg", jpeg(1))
        run(Llava558k(tmp_path / "in"), tmp_path / "out", workers=workers, rows_per_shard=1)
        assert records(tmp_path / "out") == captions(urls=True)

    def test_an_opt_out_by_url(self, tmp_path: Path) -> None:
        self.test_pictures_of_the_archive_and_urls_beside_the_right_row(tmp_path, 1)
        (tmp_path / "out.txt").write_text("https://example.org/watch.jpg\n")
        run(Llava558k(tmp_path / "in"), tmp_path / "kept", opt_out=str(tmp_path / "out.txt"))
        assert [record.id for record in records(tmp_path / "kept")] == ["004539375"]
        assert skipped(tmp_path / "kept") == [("002239345", "opted_out")]

    def test_pictures_that_are_not_in_the_archive_or_are_damaged_there(self, tmp_path: Path) -> None:
        third = CAPTIONS[0] | {"id": "3", "image": "00000/000000003.jpg"}
        write_json(tmp_path / "in" / "blip_laion_cc_sbu_558k.json", [*CAPTIONS, third])
        path = tmp_path / "in" / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("00453/004539375.jpg", jpeg(1))
            archive.writestr("00223/002239345.jpg", jpeg(2))
        content = path.read_bytes()
        path.write_bytes(content.replace(jpeg(2), jpeg(2)[:-9] + b"x" * 9))
        run(Llava558k(tmp_path / "in"), tmp_path / "out")
        assert records(tmp_path / "out") == captions(urls=False)[:1]
        assert skipped(tmp_path / "out") == [("002239345", "image_unreadable"), ("3", "image_missing")]

    def test_archives_that_are_not_there_or_broke_off(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in" / "blip_laion_cc_sbu_558k.json", CAPTIONS)
        with pytest.raises(DataError, match=r"has no images\.zip and no folder images/: llava_558k expects"):
            run(Llava558k(tmp_path / "in"), tmp_path / "out")
        (tmp_path / "in" / "images.zip").write_bytes(b"PK\x03\x04 and no end")
        with pytest.raises(
            DataError, match=r"images\.zip is not a complete zip archive .*: download it again"
        ):
            run(Llava558k(tmp_path / "in"), tmp_path / "out")


MIX = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "0780739",
        "image": "ocr_vqa/images/780739.jpg",
        "conversations": [
            {
                "from": "human",
                "value": "<image>\nWho wrote this book?\nAnswer the question using a single word or phrase.",
            },
            {"from": "gpt", "value": "Jay Heinrichs"},
        ],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [
            {"from": "human", "value": "How do I sort a list?"},
            {"from": "gpt", "value": "Call sorted()."},
        ],
    },
    {
        "id": "7",
        "image": "vg/VG_100K/7.jpg",
        "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": " "}],
    },
    {
        "id": "8",
        "image": "gqa/val/8.jpg",
        "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}],
    },
    {
        "id": "9",
        "image": "textvqa/train_images/9.jpg",
        "conversations": [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "B"}],
    },
]
PNG_NAMED_JPG = b"\x89PNG\r\n\x1a\n of a book"


class TestLlavaMix665k:
    def write(self, folder: Path) -> Path:
        write_json(folder / "llava_v1_5_mix665k.json", MIX)
        write_picture(folder / "coco/train2017/000000033471.jpg", 1)
        write_picture(folder / "vg/VG_100K/7.jpg", 3)
        write_picture(folder / "gqa/val/8.jpg", 4)
        (folder / "ocr_vqa/images").mkdir(parents=True)
        (folder / "ocr_vqa/images/780739.jpg").write_bytes(PNG_NAMED_JPG)
        return folder

    def test_rows_with_the_data_set_that_their_picture_is_of(self, tmp_path: Path) -> None:
        found = run(LlavaMix665k(self.write(tmp_path / "in")), tmp_path / "out")
        file = "llava_v1_5_mix665k.json"
        assert records(tmp_path / "out") == [
            Record(
                id="000000033471",
                source="llava_mix665k",
                kind="conversation",
                images=[ImageFile(jpeg(1), "coco/train2017/000000033471.jpg")],
                turns=[
                    {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
                    {"from": "gpt", "value": "The bus in the image is white and red."},
                    {"from": "human", "value": "What feature can be seen on the back of the bus?"},
                    {"from": "gpt", "value": "The back of the bus features an advertisement."},
                ],
                meta={"dataset": "coco", "source_file": file},
            ),
            Record(  # OCR-VQA's pictures are named .jpg, whatever they are: the bytes stay as they are
                id="0780739",
                source="llava_mix665k",
                kind="conversation",
                images=[ImageFile(PNG_NAMED_JPG, "ocr_vqa/images/780739.jpg")],
                turns=[
                    {
                        "from": "human",
                        "value": "<image>\nWho wrote this book?\nAnswer the question using a single word or phrase.",
                    },
                    {"from": "gpt", "value": "Jay Heinrichs"},
                ],
                meta={"dataset": "ocr_vqa", "source_file": file},
            ),
            Record(
                id="wgByO4Y_0",
                source="llava_mix665k",
                kind="conversation",
                images=[],
                turns=[
                    {"from": "human", "value": "How do I sort a list?"},
                    {"from": "gpt", "value": "Call sorted()."},
                ],
                meta={"model": "", "source_file": file},
            ),
        ]
        assert skipped(tmp_path / "out") == [
            ("7", "nothing_to_train"),
            ("8", "eval_split"),
            ("9", "image_missing"),
        ]
        assert found.skipped == {"nothing_to_train": 1, "eval_split": 1, "image_missing": 1}

    def test_evaluation_splits_that_are_asked_for(self, tmp_path: Path) -> None:
        run(LlavaMix665k(self.write(tmp_path / "in"), allow_eval_splits=True), tmp_path / "out")
        assert "8" in [record.id for record in records(tmp_path / "out")]

    def test_a_download_without_any_pictures(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in" / "llava_v1_5_mix665k.json", MIX)
        with pytest.raises(DataError, match="has no folder coco, gqa, ocr_vqa, textvqa, vg: llava_mix665k"):
            run(LlavaMix665k(tmp_path / "in"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_vision_flan_and_its_row_with_an_empty_answer(tmp_path: Path) -> None:
    rows = [
        {
            "id": "Image_Text+Image_Text_1",
            "image": "Image_Text+image_1.jpg",
            "task_name": "Image_Text+image_text_selection",
            "conversations": [
                {"from": "human", "value": "Select the text that describes the picture.\n<image>"},
                {"from": "gpt", "value": "A dog on a beach."},
            ],
        },
        {
            "id": "Image_Text+Image_Text_2",
            "image": "Image_Text+image_2.jpg",
            "task_name": "Image_Text+image_text_selection",
            "conversations": [
                {"from": "human", "value": "Select the text that describes the picture.\n<image>"},
                {"from": "gpt", "value": ""},
            ],
        },
    ]
    write_json(tmp_path / "in" / "annotation_191-task_1k.json", rows)
    write_picture(tmp_path / "in/images_191task_1k/Image_Text+image_1.jpg", 1)
    write_picture(tmp_path / "in/images_191task_1k/Image_Text+image_2.jpg", 2)
    run(VisionFlan(tmp_path / "in"), tmp_path / "out")
    assert records(tmp_path / "out") == [
        Record(
            id="Image_Text+Image_Text_1",
            source="vision_flan",
            kind="conversation",
            images=[ImageFile(jpeg(1), "Image_Text+image_1.jpg")],
            turns=[
                {"from": "human", "value": "Select the text that describes the picture.\n<image>"},
                {"from": "gpt", "value": "A dog on a beach."},
            ],
            meta={
                "task_name": "Image_Text+image_text_selection",
                "source_file": "annotation_191-task_1k.json",
            },
        )
    ]
    assert skipped(tmp_path / "out") == [("Image_Text+Image_Text_2", "nothing_to_train")]


class TestBunny:
    ROW: dict[str, Any] = {  # noqa: RUF012
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is the bus doing?"},
            {"from": "gpt", "value": "It waits at a stop."},
        ],
    }

    def test_rows_and_license(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in/finetune/bunny_695k.json", [self.ROW])
        write_picture(tmp_path / "in/finetune/images/coco/train2017/000000033471.jpg", 1)
        run(Bunny(tmp_path / "in"), tmp_path / "out")
        assert records(tmp_path / "out") == [
            Record(
                id="000000033471",
                source="bunny",
                kind="conversation",
                images=[ImageFile(jpeg(1), "coco/train2017/000000033471.jpg")],
                turns=[
                    {"from": "human", "value": "<image>\nWhat is the bus doing?"},
                    {"from": "gpt", "value": "It waits at a stop."},
                ],
                meta={"dataset": "coco", "source_file": "bunny_695k.json", "license": "Apache-2.0"},
            )
        ]
        assert manifest(tmp_path / "out")["licenses"] == {"Apache-2.0": 1}

    def test_parts_of_the_archive_are_named_with_the_command_that_unpacks_them(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in/finetune/bunny_695k.json", [self.ROW])
        (tmp_path / "in/finetune/images.tar.gz.part-aa").write_bytes(b"\x1f\x8b")
        with pytest.raises(
            DataError, match=r"no folder images/: unpack them with `cd .*/finetune && cat .* \| tar -xz`"
        ):
            run(Bunny(tmp_path / "in"), tmp_path / "out")

    def test_no_pictures_at_all(self, tmp_path: Path) -> None:
        write_json(tmp_path / "in/finetune/bunny_695k.json", [self.ROW])
        with pytest.raises(DataError, match=r"has no finetune/images/: bunny expects finetune/bunny_695k"):
            run(Bunny(tmp_path / "in"), tmp_path / "out")
