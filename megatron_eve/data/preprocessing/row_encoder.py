"""One row of the input -> token ids, labels and checked image files, or the reason why not."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.format.manifest import IMAGE_STORAGES, DatasetSettings
from megatron_eve.data.format.metadata import Exclusions, sample_meta
from megatron_eve.data.format.sample_block import Sample, StoredImage, sum_changes
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, MAX_PIXELS_LIMIT, decode_image
from megatron_eve.data.images.decode import read_header
from megatron_eve.data.reasons import IMAGES_AT_END, IMAGES_CUT_OFF
from megatron_eve.data.schema import ImageFile, Record, VideoFile
from megatron_eve.data.sources.image_files import read_image_file
from megatron_eve.data.sources.source import RawRow, Source
from megatron_eve.data.text.documents import encode_record
from megatron_eve.data.text.load_tokenizer import is_json, load_tokenizer
from megatron_eve.data.text.templates import missing_control_token, templates
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.image_flags import ImageSetting, ImageSettings
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.models.text_format import PLAIN
from megatron_eve.runtime.dali import DALI_REMEDY

MAX_VIDEO_FRAMES = 10_000
"""Pictures of a video: all of them are in memory at once."""

if TYPE_CHECKING:
    from megatron_eve.data.images.backends import BackendName
    from megatron_eve.data.images.storage import ImageStore, StorageSettings


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What `preprocess` is to do; the flags of tools/preprocess_data.py.

    Attributes:
        input: a file, a pattern such as `shards/*.tar`, or several of them; see `data/sources/recognise.py`.
        input_format: name of their layout; None recognises it.
        image_root: the folder that image names are relative to, and must stay in. Not needed where the input holds the
            pictures.
        drop_license: patterns; rows whose license matches one are left out.
        opt_out: a file of ids, URLs and sha256 of rows that are left out; see `metadata.Exclusions`.
        follow_links: take images under it that are links to files elsewhere, as in Hugging Face's cache.
        tokenizer_model: a Llama tokenizer.model, or a tokenizer.json.
        tokenizer_legacy: how a tokenizer.model is read, see `Tokenizer`; None for what the family says.
        output_prefix: where the dataset goes.
        overwrite: replace a dataset that is there already.
        template: name of one, see `data/text/templates.py`.
        family: of the model that the dataset is for.
        image_settings: of that model, by the names of the family's `image_flags`; the others have their defaults.
        model_max_length: samples are cut at this many tokens. An image counts as one, or as its rows where the family
            says so (`TextRules.length_counts_rows`).
        workers: processes; 1 works in this one.
        apply_exif: turn pictures upright as their EXIF data says.
        max_image_pixels: larger pictures are left out.
        image_storage: "encoded", "jpeg" or "pixels", see `manifest.IMAGE_STORAGES`.
        image_decoder: "auto", "dali", "threads" or "pillow", for "jpeg" and "pixels"; "encoded" takes Pillow.
        jpeg_quality: 1 to 100.
        jpeg_subsampling: of colours, "420" or "444".
        video_frames: frames that are taken of a video, see `frames.extract_frames`.
    """

    input: str | Sequence[str]
    tokenizer_model: str
    output_prefix: str
    overwrite: bool = False
    tokenizer_legacy: bool | None = None
    image_root: str | None = None
    input_format: str | None = None
    template: str = "plain"
    family: str = DEFAULT_FAMILY
    image_settings: ImageSettings = field(default_factory=dict)
    model_max_length: int = 2048
    workers: int = 1
    apply_exif: bool = True
    max_image_pixels: int = DEFAULT_MAX_PIXELS
    follow_links: bool = False
    drop_license: Sequence[str] = ()
    opt_out: str | None = None
    image_storage: str = "encoded"
    image_decoder: BackendName = "auto"
    jpeg_quality: int = 90
    jpeg_subsampling: str = "420"
    video_frames: int = 8

    @property
    def inputs(self) -> tuple[str, ...]:
        """The words of --input."""
        return (self.input,) if isinstance(self.input, str) else tuple(self.input)

    @property
    def all_image_settings(self) -> dict[str, ImageSetting]:
        """`image_settings` with the defaults of those that are left out."""
        flags = find_family(self.family).image_flags
        return {name: self.image_settings.get(name, flag.default) for name, flag in flags.items()}

    def check(self) -> None:
        """Raise DataError, naming the flag and the remedy, for a value that cannot be."""
        for error in find_family(self.family).check_image_settings(self.all_image_settings):
            raise DataError(error)
        if self.template not in templates():
            raise DataError(f"--template {self.template}: use one of {', '.join(templates())}")
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise DataError(
                f"--image-root {self.image_root} is not a folder: name the one that file names are relative to"
            )
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: use 1 or more")
        if self.model_max_length < 2:
            raise DataError(f"--model-max-length {self.model_max_length}: use 2 or more")
        if not 1 <= self.video_frames <= MAX_VIDEO_FRAMES:
            raise DataError(f"--video-frames {self.video_frames}: use 1 to {MAX_VIDEO_FRAMES}")
        if not 1 <= self.max_image_pixels <= MAX_PIXELS_LIMIT:
            raise DataError(f"--max-image-pixels {self.max_image_pixels}: use 1 to {MAX_PIXELS_LIMIT}")
        self._check_storage()

    def _check_storage(self) -> None:
        if self.image_storage not in IMAGE_STORAGES:
            raise DataError(f"--image-storage {self.image_storage}: use {' or '.join(IMAGE_STORAGES)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise DataError(f"--jpeg-quality {self.jpeg_quality}: use 1 to 100")
        if self.jpeg_subsampling not in ("420", "444"):
            raise DataError(f"--jpeg-subsampling {self.jpeg_subsampling}: use 420 or 444")
        if self.image_storage == "encoded" and self.image_decoder not in ("auto", "pillow"):
            raise DataError(
                f"--image-decoder {self.image_decoder}: encoded images are not decoded into the dataset; add "
                "--image-storage jpeg or pixels, or leave the flag out"
            )
        if self.image_decoder == "dali":
            try:
                importlib.import_module("nvidia.dali")
            except ImportError as error:
                raise DataError(
                    f"--image-decoder dali: nvidia.dali cannot be imported ({error}); {DALI_REMEDY}"
                ) from error

    def tokenizer(self) -> TextTokenizer:
        """Open the tokenizer, and refuse one that the template does not fit.

        Raises:
            DataError: it is none, or lacks a control token of the template, or the newline with which captions end.
        """
        legacy = self.tokenizer_legacy
        if legacy is not None and is_json(self.tokenizer_model):
            raise DataError(
                f"--{'' if legacy else 'no-'}tokenizer-legacy: says how a tokenizer.model is read, and "
                f"{self.tokenizer_model} is a tokenizer.json; leave the flag out"
            )
        rules = find_family(self.family).text_rules
        found = load_tokenizer(
            self.tokenizer_model, rules.tokenizer_legacy if legacy is None else legacy, rules.added_tokens
        )
        if (token := missing_control_token(self.template, found.encode)) is not None:
            raise DataError(
                f"--template {self.template}: it has the control token {token}, which {self.tokenizer_model} lacks; "
                "give the tokenizer of a model that the template is for, or choose another template"
            )
        if self.template == PLAIN.name:
            found.check_newline()
        return found

    def dataset_settings(self, tokenizer: TextTokenizer) -> DatasetSettings:
        """What the manifest records."""
        flags = find_family(self.family).image_flags
        return DatasetSettings(
            template=self.template,
            family=self.family,
            image_settings={
                name: value
                for name, value in self.all_image_settings.items()
                if flags[name].decides_rows and not (flags[name].at_most and value == flags[name].default)
            },
            model_max_length=self.model_max_length,
            apply_exif=self.apply_exif,
            max_pixels=self.max_image_pixels,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            image_storage=self.image_storage,
            tokenizer_kind=tokenizer.kind,
        )

    def storage(self) -> StorageSettings | None:
        """How images are stored; None where their files are kept as they are. Imports torch otherwise."""
        if self.image_storage == "encoded":
            return None
        from megatron_eve.data.images.interface import DecodeSettings
        from megatron_eve.data.images.storage import StorageSettings

        return StorageSettings(
            image_storage=self.image_storage,
            image_decoder=self.image_decoder,
            family=self.family,
            image_settings=self.all_image_settings,
            decode=DecodeSettings(self.apply_exif, self.max_image_pixels),
            jpeg_quality=self.jpeg_quality,
            jpeg_subsampling=self.jpeg_subsampling,
        )


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
            whole = [image for image in images if isinstance(image, StoredImage)]
            if len(whole) == len(images):
                results[number] = result._replace(images=whole)
                continue
            encoded = self.encode(rows[number])
            if isinstance(encoded, Sample):  # Pillow decides whether a picture can be used
                again = [self._store.with_pillow(one.data) for one in result.images]
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
        if record.video is not None:
            from megatron_eve.data.sources.frames import extract_frames, with_frames

            taken = extract_frames(
                self._read(record.video, row),
                count=self._config.video_frames,
                max_pixels=self._config.max_image_pixels,
                upright=self._config.apply_exif,
            )
            record = with_frames(record, taken)
        loaded = [self._load_image(image, row) for image in record.images] if self._tiled else None
        whole = encode_record(
            record, self._tokenizer, self._config.template, self._tiles(loaded) if self._tiled else None
        )
        rows: list[list[int]] | None = None
        if (
            self._planner is not None and record.images
        ):  # where a sample ends depends on the sizes of its pictures
            loaded = loaded or [self._load_image(image, row) for image in record.images]
            rows = [self._planner(*image.size).tile_rows for image in loaded]
        encoded = whole.cut(self._config.model_max_length, rows)
        if encoded.num_labels == 0:
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
            images=[image.stored for image in loaded[:kept]],
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
