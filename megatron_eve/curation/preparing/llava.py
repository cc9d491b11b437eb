"""Data sets in the layout of LLaVA, one JSON of conversations: LLaVA-558K, mix-665K, Vision-Flan, Bunny-695K.

Rows stay as they are published; in `meta` comes what is not in a conversation, and the data set that a picture is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from megatron_eve.curation.preparing.preparer import Preparer
from megatron_eve.curation.preparing.reasons import EVAL_SPLIT
from megatron_eve.curation.preparing.splits import is_eval_split
from megatron_eve.curation.preparing.zipped_pictures import ZippedPictures
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.sources.fields import parse_object
from megatron_eve.data.sources.json_reader import JsonReader
from megatron_eve.data.sources.llava import LlavaSource
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.turns import checked_turns


class ConversationSource(LlavaSource):
    """Conversations of a published JSON file, checked for an answer.

    Args:
        files: the JSON file.
        name: `source` of the records.
        by_folder: the first folder of a picture's name is the data set that it is of, and goes into `meta` as
            "dataset": coco, gqa, ocr_vqa, textvqa, vg.
        allow_eval_splits: keep rows whose picture is in a folder of a test or validation split.
        pictures: archive of the pictures; None where they are files.
    """

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        *,
        by_folder: bool = False,
        allow_eval_splits: bool = False,
        pictures: ZippedPictures | None = None,
    ) -> None:
        super().__init__(files)
        self._name = name
        self._by_folder = by_folder
        self._allow_eval_splits = allow_eval_splits
        self._pictures = pictures

    def _record(self, row: RawRow, fields: dict[str, Any]) -> Record:
        record = super()._record(row, fields)
        check_answers(record)
        meta, images = dict(record.meta), record.images
        if self._by_folder and images and images[0].path:
            name = PurePosixPath(images[0].path)
            if not self._allow_eval_splits and is_eval_split(str(name.parent)):
                raise SkipRow(EVAL_SPLIT, f"its picture is {name}")
            meta["dataset"] = name.parts[0]
        if self._pictures is not None:
            images = [
                replace(one, data=self._pictures.read(one.path)) if one.data is None and one.path else one
                for one in images
            ]
        return replace(record, source=self._name, meta=meta, images=images)


class _CaptionSource(ConversationSource):
    """Captions of LLaVA-558K, each with the URL of its picture in `meta`, by the picture's name.

    Args:
        files: the JSON file of the captions.
        pictures: as of ConversationSource.
        urls: blip_laion_cc_sbu_558k_meta.json, rows of {"image", "url", ...}.
    """

    def __init__(self, files: Sequence[Path], pictures: ZippedPictures | None, urls: Path) -> None:
        super().__init__(files, Llava558k.name, pictures=pictures)
        self._urls = urls

    def rows(self) -> Iterator[RawRow]:
        """The JSON text of each row with its URL, None if there is none. The parent alone holds the URLs."""
        urls: dict[str, str] = {}
        with JsonReader(self._urls) as reader:
            for _, text in reader.texts():
                with suppress(SkipRow):  # which has no URL for its picture then
                    fields = parse_object(text)
                    if isinstance(image := fields.get("image"), str) and isinstance(fields.get("url"), str):
                        urls[image] = fields["url"]
        for row in super().rows():
            image = None
            with suppress(SkipRow):  # which `record` reports
                image = parse_object(row.payload).get("image")
            url = urls.get(image) if isinstance(image, str) else None
            yield row._replace(payload=(row.payload, url))

    def _make_record(self, row: RawRow) -> Record:
        text, url = row.payload
        record = super()._make_record(row._replace(payload=text))
        return record if url is None else replace(record, meta={**record.meta, "url": url})


@dataclass
class Llava558k(Preparer):
    """One caption a picture; its question is one of LLaVA's requests for a short description.

    Pictures are read from images.zip, or from the folder images/ where that was unpacked. `meta` has the URL of the
    picture if the file of URLs is there.
    """

    name: ClassVar[str] = "llava_558k"
    what: ClassVar[str] = "LLaVA-558K, captions of LAION, CC and SBU"
    layout: ClassVar[str] = (
        "blip_laion_cc_sbu_558k.json, images.zip (or what it holds, in images/), and for the URLs "
        "blip_laion_cc_sbu_558k_meta.json"
    )

    def files(self) -> list[Path]:
        """The JSON file."""
        return self.find("blip_laion_cc_sbu_558k.json")

    @property
    def image_root(self) -> Path:
        """Folder of the unpacked pictures."""
        return self.folder / "images"

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the rows, and of the archive if it was not unpacked."""
        pictures: ZippedPictures | None = None
        if not self.image_root.is_dir():
            archive = self.folder / "images.zip"
            if not archive.is_file():
                raise self.missing("images.zip and no folder images/")
            pictures = ZippedPictures(archive)
        urls = self.folder / "blip_laion_cc_sbu_558k_meta.json"
        if urls.is_file():
            return _CaptionSource(files, pictures, urls)
        return ConversationSource(files, self.name, pictures=pictures)


@dataclass
class LlavaMix665k(Preparer):
    """Conversations, some of them without a picture; `meta` has the folder of the picture as "dataset"."""

    name: ClassVar[str] = "llava_mix665k"
    what: ClassVar[str] = "LLaVA-1.5's mixture of 665,000 instructions"
    layout: ClassVar[str] = (
        "llava_v1_5_mix665k.json, and the pictures in coco/train2017, gqa/images, ocr_vqa/images, "
        "textvqa/train_images, vg/VG_100K and vg/VG_100K_2"
    )

    def files(self) -> list[Path]:
        """The JSON file."""
        return self.find("[Ll][Ll][Aa][Vv][Aa]_v1_5_mix665[Kk].json")

    @property
    def image_root(self) -> Path:
        """The download itself: names begin with the folder of a data set."""
        return self.folder

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the rows."""
        require_folder(self, "coco", "gqa", "ocr_vqa", "textvqa", "vg")
        return ConversationSource(files, self.name, by_folder=True, allow_eval_splits=self.allow_eval_splits)


@dataclass
class VisionFlan(Preparer):
    """Conversations of 191 tasks as they are; `meta` has task_name."""

    name: ClassVar[str] = "vision_flan"
    what: ClassVar[str] = "Vision-Flan, 191 tasks of vision"
    layout: ClassVar[str] = "annotation_191-task_1k.json, and the pictures in images_191task_1k/"

    def files(self) -> list[Path]:
        """The JSON file."""
        return self.find("annotation_191-task_1k.json")

    @property
    def image_root(self) -> Path:
        """Folder of the pictures."""
        return self.folder / "images_191task_1k"

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the rows."""
        require_folder(self, "images_191task_1k")
        return ConversationSource(files, self.name)


@dataclass
class Bunny(Preparer):
    """Conversations as they are, most of them on the pictures of mix-665K.

    The archive of the pictures is published in parts and compressed as a whole, so no picture in it can be read by
    itself: it has to be unpacked.
    """

    name: ClassVar[str] = "bunny"
    what: ClassVar[str] = "Bunny-695K, the instructions of Bunny v1.0"
    layout: ClassVar[str] = "finetune/bunny_695k.json, and the pictures in finetune/images/"
    license: ClassVar[str] = "Apache-2.0"

    def files(self) -> list[Path]:
        """The JSON file."""
        inner = self.folder / "finetune"
        return self.find("finetune/bunny_695k.json" if inner.is_dir() else "bunny_695k.json")

    @property
    def image_root(self) -> Path:
        """Folder of the pictures, beside the JSON file."""
        return self.folder / ("finetune/images" if (self.folder / "finetune").is_dir() else "images")

    def open(self, files: Sequence[Path]) -> Source:
        """A reader of the rows."""
        if not self.image_root.is_dir():
            if any(files[0].parent.glob("images.tar.gz.part-*")):
                raise DataError(
                    f"{files[0].parent} has parts of images.tar.gz and no folder images/: unpack them with "
                    f"`cd {files[0].parent} && cat images.tar.gz.part-* | tar -xz`, which needs no joined copy"
                )
            raise self.missing(f"{self.image_root.relative_to(self.folder)}/")
        return ConversationSource(files, self.name, by_folder=True, allow_eval_splits=self.allow_eval_splits)


def check_answers(record: Record) -> None:
    """Raise SkipRow unless the turns of a record are turns, and one of its answers has a text."""
    if all(turn.text == "" for turn in checked_turns(record.turns) if turn.role == "gpt"):
        raise SkipRow("nothing_to_train", "no answer has a text")


def require_folder(preparer: Preparer, *names: str) -> None:
    """Raise DataError unless one of these folders is in the download; rows of the others are skipped and counted."""
    if not any((preparer.folder / name).is_dir() for name in names):
        raise preparer.missing(f"folder {', '.join(names)}")
