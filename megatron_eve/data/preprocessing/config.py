"""What a dataset is made of and how: the flags of tools/preprocess_data.py, checked."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.data.errors import DataError
from megatron_eve.data.format.manifest import IMAGE_STORAGES, DatasetSettings
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, MAX_PIXELS_LIMIT
from megatron_eve.data.text.load_tokenizer import is_json, load_tokenizer, tokenizer_file
from megatron_eve.data.text.templates import template_of, templates, unfit_tokenizer
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.image_flags import ImageSetting, ImageSettings
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.models.text_format import CHAT_TEMPLATE, PLAIN
from megatron_eve.runtime.dali import DALI_REMEDY

MAX_VIDEO_FRAMES = 10_000
"""Pictures of a video: all of them are in memory at once."""

if TYPE_CHECKING:
    from megatron_eve.data.images.backends import BackendName
    from megatron_eve.data.images.storage import StorageSettings


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
        tokenizer_model: a Llama tokenizer.model, a tokenizer.json, or a folder that holds one.
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
        draw: pictures and videos of pairs are to be drawn from their captions.
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
    draw: bool = False

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
        if self.draw and "generation" not in templates()[self.template].kinds:
            draws = [name for name, one in templates().items() if "generation" in one.kinds]
            raise DataError(
                f"--draw: samples of --template {self.template} are not drawn from their captions; use one of "
                f"{', '.join(draws)}"
            )
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
        if self.image_storage != "encoded" and find_family(self.family).reads_codes:
            raise DataError(
                f"--image-storage {self.image_storage}: the family {self.family} reads pictures as codes, which are "
                "made of files as they are; use --image-storage encoded"
            )
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
        path = tokenizer_file(self.tokenizer_model)
        if legacy is not None and is_json(path):
            raise DataError(
                f"--{'' if legacy else 'no-'}tokenizer-legacy: says how a tokenizer.model is read, and "
                f"{path} is a tokenizer.json; leave the flag out"
            )
        rules = find_family(self.family).text_rules
        found = load_tokenizer(path, rules.tokenizer_legacy if legacy is None else legacy, rules.added_tokens)
        if unfit := unfit_tokenizer(self.template, found):
            raise DataError(
                f"--template {self.template}: {unfit}; give the tokenizer of a model that the template is for, or "
                "choose another template"
            )
        try:
            template_of(self.template, found)
        except DataError as error:
            raise DataError(f"--template {self.template}: {error}") from None
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
            chat_template_sha256=self._chat_template_sha256(tokenizer),
        )

    def _chat_template_sha256(self, tokenizer: TextTokenizer) -> str:
        if self.template != CHAT_TEMPLATE.name:
            return ""
        from megatron_eve.data.text.chat_template import chat_template_sha256

        return chat_template_sha256(tokenizer.path)

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
