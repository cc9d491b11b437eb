"""One row of the input -> token ids, labels and checked image files, or the reason why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.metadata import Exclusions, sample_meta
from megatron_eve.data.format.sample_block import Sample, StoredImage, sum_changes
from megatron_eve.data.images import decode_image
from megatron_eve.data.images.decode import read_header
from megatron_eve.data.preprocessing.config import PreprocessConfig
from megatron_eve.data.reasons import IMAGES_AT_END, IMAGES_CUT_OFF
from megatron_eve.data.schema import ImageFile, Record, VideoFile
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.documents import as_generation, encode_record
from megatron_eve.data.text.templates import template_of
from megatron_eve.models.registry import find_family

if TYPE_CHECKING:
    from megatron_eve.data.images.storage import ImageStore


@dataclass(frozen=True)
class SkippedRow:
    """A row that is left out: its number in its file (from 1), why, and what it called itself."""

    file: str
    row: int
    reason: str
    detail: str
    id: str | None = None
    image: str | None = None


class _LoadedImage(NamedTuple):
    """An image as it is stored, and its upright width and height as the family plans it."""

    stored: StoredImage
    size: tuple[int, int]


class RowEncoder:
    """Turns rows into samples; one for each process.

    Args:
        config: of the dataset.
        source: of the rows.

    Attributes:
        settings: of the dataset.
    """

    def __init__(self, config: PreprocessConfig, source: Source) -> None:
        self._config = config
        self._source = source
        self._tokenizer = config.tokenizer()
        self._template = template_of(config.template, self._tokenizer)
        family = find_family(config.family)
        self._planner = (
            family.image_planner(config.all_image_settings) if family.text_rules.length_counts_rows else None
        )
        self._tiled = self._planner is not None and self._planner(1, 1).is_tiled
        self.settings = config.dataset_settings(self._tokenizer)
        self._root = config.image_root
        self._excluded = Exclusions(tuple(config.drop_license), config.opt_out)
        self._decodes = True  # pictures are decoded where they are read
        self._store: ImageStore | None = None
        if (storage := config.storage()) is not None:
            from megatron_eve.data.images.storage import ImageStore

            self._store = ImageStore(storage, workers=config.workers)

    def encode_chunk(self, rows: Sequence[RawRow]) -> list[Sample | SkippedRow]:
        """Encode rows, in order; their pictures are decoded together where they are stored decoded.

        A row with a picture that cannot be stored is encoded again as with image storage "encoded", so that the same
        rows are left out, for the same reasons.
        """
        if self._store is None:
            return [self.encode(row) for row in rows]
        self._decodes = False
        results = [self.encode(row) for row in rows]
        self._decodes = True
        for number, (row, result) in enumerate(zip(rows, results, strict=True)):
            # Pictures that were cut off with their text are not stored, but checked like the others.
            if isinstance(result, SkippedRow) or result.cut:
                encoded = self.encode(row)
                if isinstance(encoded, SkippedRow):
                    results[number] = encoded
        kept = [(number, result) for number, result in enumerate(results) if isinstance(result, Sample)]
        stored = iter(self._store.store([image.data for _, result in kept for image in result.images]))
        for number, result in kept:
            images = [next(stored) for _ in result.images]
            whole = [
                replace(image, drawn=one.drawn)
                for image, one in zip(images, result.images, strict=True)
                if isinstance(image, StoredImage)
            ]
            if len(whole) == len(images):
                results[number] = result._replace(images=whole)
                continue
            encoded = self.encode(rows[number])
            if isinstance(encoded, Sample):  # Pillow decides whether a picture can be used
                again = [replace(self._store.with_pillow(one.data), drawn=one.drawn) for one in result.images]
                encoded = result._replace(images=again)
            results[number] = encoded
        return results

    def encode(self, row: RawRow) -> Sample | SkippedRow:
        """Tokenise the text of a row and decode its images.

        Raises:
            DataError: it names a picture, and there is no --image-root.
        """
        name: str | None = None
        image: str | None = None
        try:
            record = self._source.record(row)
            name, image = record.id, _names(record)
            return self._encode(row, record)
        except SkipRow as skip:
            name, image = (
                None if value is None else _printable(value)
                for value in (name or skip.id, image or skip.image)
            )
            return SkippedRow(row.file, row.number, skip.reason, _printable(skip.detail), name, image)

    def _encode(self, row: RawRow, record: Record) -> Sample:
        self._excluded.check(record)
        if record.kind == "pair" and (record.drawn or self._config.draw):
            record = as_generation(record)
        if record.video is not None:
            from megatron_eve.data.sources.frame_rows import with_frames
            from megatron_eve.data.sources.frames import extract_frames

            taken = extract_frames(
                self._read(record.video, row),
                count=self._config.video_frames,
                max_pixels=self._config.max_image_pixels,
                upright=self._config.apply_exif,
            )
            record = with_frames(record, taken)
            if record.drawn and len(record.images) < self._config.video_frames:
                raise SkipRow(
                    "video_too_short", f"{len(record.images)} frames of {self._config.video_frames}"
                )
        loaded = [self._load_image(image, row) for image in record.images] if self._tiled else None
        whole = encode_record(
            record, self._tokenizer, self._template, self._tiles(loaded) if self._tiled else None
        )
        rows: list[list[int]] | None = None
        if (
            self._planner is not None and record.images
        ):  # where a sample ends depends on the sizes of its pictures
            loaded = loaded or [self._load_image(image, row) for image in record.images]
            rows = [self._planner(*image.size).tile_rows for image in loaded]
            if record.is_video and any(record.drawn_images):  # which is drawn whole
                rows = [[one for image in rows for one in image]]
        encoded = whole.cut(self._config.model_max_length, rows)
        if whole.num_drawn and not encoded.num_drawn and record.kind == "generation":
            raise SkipRow(
                "drawn_cut_off", f"the sample has {len(whole.tokens)} tokens without the rows of images"
            )
        if encoded.num_labels == 0 and not encoded.num_drawn:
            raise SkipRow(
                "nothing_to_train", f"{len(whole.tokens)} tokens, of which {whole.num_labels} train"
            )
        if loaded is None:
            loaded = [self._load_image(image, row) for image in record.images]
        tiles = self._tiles(loaded)
        in_text, kept = whole.whole_images(tiles), encoded.whole_images(tiles)
        changes = {IMAGES_AT_END: len(record.images) - in_text, IMAGES_CUT_OFF: in_text - kept}
        return Sample(
            tokens=np.array(encoded.tokens, dtype=np.int32),
            labels=np.array(encoded.labels, dtype=np.int32),
            # An image whose place was cut off is not part of the sample.
            images=[
                replace(image.stored, drawn=drawn)
                for image, drawn in zip(loaded[:kept], record.drawn_images, strict=False)
            ],
            cut=len(whole.tokens) > len(encoded.tokens),
            meta=sample_meta(record),
            num_missing=record.num_missing,
            changes=sum_changes([record.changes, changes]),
        )

    def _tiles(self, images: Sequence[_LoadedImage] | None) -> list[int]:
        """Tiles of each image; 1 where images are not cut into tiles."""
        images = images or ()
        if not self._tiled or self._planner is None:
            return [1] * len(images)
        return [self._planner(*image.size).tiles for image in images]

    def _read(self, file: ImageFile | VideoFile, row: RawRow) -> bytes:
        """The whole file of a picture or a video."""
        data = file.data
        if data is None:
            if self._root is None:
                kind = "video" if isinstance(file, VideoFile) else "picture"
                raise DataError(
                    f"{row.file}, row {row.number} names the {kind} {file.path}: give its folder as --image-root"
                )
            data = read_image_file(self._root, str(file.path), self._config.follow_links)
        self._excluded.check_file(data)
        return data

    def _load_image(self, image: ImageFile, row: RawRow) -> _LoadedImage:
        data = self._read(image, row)
        if not self._decodes:
            # What is no picture is not held for the whole chunk. Its size in the dataset is known once it is stored.
            header = read_header(data, self._config.max_image_pixels)
            return _LoadedImage(StoredImage(data, 0, 0), header.upright_size(self._config.apply_exif))
        decoded = decode_image(
            data, apply_exif=self._config.apply_exif, max_pixels=self._config.max_image_pixels
        )
        return _LoadedImage(StoredImage(data, decoded.width, decoded.height), decoded.size)


def _names(record: Record) -> str | None:
    """What a record calls its pictures or its video, if it does: a name, or a list of them."""
    if record.video is not None:
        return record.video.path
    names = [image.path for image in record.images if image.path is not None]
    return str(names if len(names) > 1 else names[0]) if names else None


def _printable(value: object) -> str:
    """Text for a list that people read: control characters and halves of surrogate pairs as escapes."""
    text = str(value)[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
