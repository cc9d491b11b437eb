#!/usr/bin/env python
"""Make an indexed dataset from rows of text and pictures, in the layouts in which data sets are published."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config.early_flags import flag_value
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
from megatron_eve.data.preprocessing.summary import format_next, format_summary
from megatron_eve.data.sources.recognise import FORMATS
from megatron_eve.data.text.templates import templates
from megatron_eve.models.image_flags import ImageFlag
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.runtime.command_line import CommandParser
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Make an indexed dataset from rows of text and pictures. The layout of the input is recognised:

  llava        .json, .jsonl, .ndjson: an array, or a line each, of {"id", "image": a file name, a list or absent,
               "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, with one
               <image> in the text for each image; or "video": a file name, in place of "image"; or "messages":
               [{"role": "user", "content": text, or a list of text and image parts}, ...], with "images".
               "draw": true, or a list of true and false for the images, says which of them are to be drawn
  webdataset   .tar: shards of img2dataset (LAION, COYO) and of video2dataset (WebVid), and SA-1B's
  parquet      .parquet: data sets of the Hugging Face hub with an image and a caption, or with conversations or
               messages; and shards of records (docs/data.md)
  mmc4         .jsonl: documents with pictures between their sentences
  text         .jsonl: {"text"}, {"text", "images"} with an <image> in the text for each, or {"inputs", "targets"}
  open_images  .csv: OpenImages' list of pictures
  video        .mp4, .webm, .mkv, .mov, .avi: a row each, its caption in clip.txt beside clip.mp4, or in clip.json

Rows that cannot be used are left out, counted by reason in the summary and listed in OUT_skipped.jsonl. What a source
says of a row beside its text and pictures goes to OUT_meta.parquet. The exit status is 0 if any row was kept. Nothing
is extracted or downloaded.
"""
EXAMPLES = """\
python tools/preprocess_data.py --input captions.json --image-root photos \\
    --tokenizer-model vicuna-7b/tokenizer.model --output-prefix data/captions
python tools/preprocess_data.py --input 'laion/*.tar' \\
    --tokenizer-model vicuna-7b/tokenizer.model --output-prefix data/laion
"""


def build_parser(family: str = DEFAULT_FAMILY) -> argparse.ArgumentParser:
    """The flags, one for each field of PreprocessConfig and for each image setting of the family.

    Raises:
        FamilyError: there is no such family.
    """
    settings = find_family(family).image_flags
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    _add_input(parser, family)
    _add_text(parser, family)
    _add_images(parser, family, settings)
    _add_storage(parser, settings)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that tokenize and decode (default: one for each CPU core, at most 8; here %(default)s)",
    )
    return parser


def _add_input(parser: argparse.ArgumentParser, family: str) -> None:
    """Flags of what is read and written."""
    needed = parser.add_argument_group(
        "input and output", "What is read, what is left out, and where the dataset goes."
    )
    needed.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help="input files, all of one layout, or patterns in quotation marks, whose files are sorted by name",
    )
    needed.add_argument(
        "--input-format", choices=tuple(FORMATS), help="layout of the input (default: recognised, see above)"
    )
    needed.add_argument(
        "--image-root",
        metavar="DIR",
        help="folder that names of images and videos are relative to; not needed for webdataset, parquet and video, "
        "which hold them",
    )
    needed.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="FILE",
        help="tokenizer of the language model: its sentencepiece tokenizer.model, its tokenizer.json with "
        "tokenizer_config.json beside it, or the folder that holds one (of both, tokenizer.model)",
    )
    needed.add_argument(
        "--tokenizer-legacy",
        action=argparse.BooleanOptionalAction,
        help="read a tokenizer.model as Hugging Face does with legacy=True; with --no-tokenizer-legacy, legacy=False "
        f"(default: as the family's published models were trained; of {family} "
        f"{'legacy=True' if find_family(family).text_rules.tokenizer_legacy else 'legacy=False'})",
    )
    needed.add_argument(
        "--output-prefix",
        required=True,
        metavar="OUT",
        help="prefix of the dataset: OUT_text.bin, OUT_image.bin, OUT_dataset.json ... are written",
    )
    needed.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a dataset that OUT is already, which opens until the new one is complete",
    )
    needed.add_argument(
        "--follow-links",
        action="store_true",
        help="read images that are links to files outside --image-root, as in Hugging Face's cache; otherwise their "
        "rows are left out",
    )
    needed.add_argument(
        "--drop-license",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="leave out rows whose license matches a pattern, such as '*-nc-*' (case is ignored); rows without a "
        "license are kept",
    )
    needed.add_argument(
        "--opt-out",
        metavar="FILE",
        help="file of ids, URLs and image sha256 digests, one a line, whose rows are left out",
    )


def _add_text(parser: argparse.ArgumentParser, family: str) -> None:
    """Flags of texts."""
    text = parser.add_argument_group("text", "How texts become tokens and labels.")
    text.add_argument(
        "--template",
        choices=tuple(templates()),
        metavar="NAME",
        default=PreprocessConfig.template,
        help="what a sample is made of. "
        + "; ".join(f"{name}: {one.what}" for name, one in templates().items()),
    )
    text.add_argument(
        "--draw",
        action="store_true",
        help="images and videos that have a caption are to be drawn from it, by a model that can: rows of text and "
        'picture, in this order. Without it those whose row says "draw": true are (docs/data.md)',
    )
    text.add_argument(
        "--model-max-length",
        type=int,
        default=PreprocessConfig.model_max_length,
        metavar="N",
        help="cut samples at N tokens, an image counting as "
        + ("its rows" if find_family(family).text_rules.length_counts_rows else "one"),
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _listed(names: Iterable[str]) -> str:
    """Flags in words; empty without any."""
    *others, last = [*map(_flag, names)] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def _add_settings(
    group: argparse._ArgumentGroup, settings: Mapping[str, ImageFlag], decides_rows: bool
) -> None:
    """Flags of the image settings of a family: those that decide rows of the sequence, or the others."""
    for name, setting in settings.items():
        if setting.decides_rows != decides_rows:
            continue
        kind: dict[str, Any] = (
            {"choices": setting.choices} if setting.choices else {"type": int, "metavar": setting.metavar}
        )
        group.add_argument(_flag(name), default=setting.default, help=setting.help, **kind)


def _add_images(parser: argparse.ArgumentParser, family: str, settings: Mapping[str, ImageFlag]) -> None:
    """Flags of pictures."""
    images = parser.add_argument_group("images", "Which model the images are for, and how they are read.")
    images.add_argument(
        "--family",
        default=family,
        metavar="NAME",
        help="model family that the dataset is for, which has image settings of its own",
    )
    _add_settings(images, settings, decides_rows=True)
    images.add_argument(
        "--ignore-exif-orientation",
        action="store_true",
        help="do not rotate images as their EXIF data says (the published model did not)",
    )
    images.add_argument(
        "--max-image-pixels",
        type=int,
        default=PreprocessConfig.max_image_pixels,
        metavar="N",
        help="leave out rows with an image of more than N pixels (width x height), before it is decoded",
    )
    images.add_argument(
        "--video-frames",
        type=int,
        default=PreprocessConfig.video_frames,
        metavar="N",
        help="images that a video becomes: N frames from its first to its last, evenly spaced in time",
    )


def _add_storage(parser: argparse.ArgumentParser, settings: Mapping[str, ImageFlag]) -> None:
    """Flags of how pictures are stored."""
    every = _listed(settings)
    of_jpeg = _listed(
        [name for name, one in settings.items() if "jpeg" in one.binds and not one.decides_rows]
    )
    storage = parser.add_argument_group("storage", "How images are stored in the dataset.")
    storage.add_argument(
        "--image-storage",
        choices=("encoded", "jpeg", "pixels"),
        default=PreprocessConfig.image_storage,
        help="format of stored images. encoded: files as they are; jpeg: JPEG at the model's size, where that is "
        f"smaller{of_jpeg and f', for this {of_jpeg} only'}; pixels: decoded, for this {every} only",
    )
    storage.add_argument(
        "--image-decoder",
        choices=("auto", "dali", "threads", "pillow"),
        default=PreprocessConfig.image_decoder,
        help="decoder for --image-storage jpeg and pixels; auto: DALI where there is a GPU, threads elsewhere",
    )
    storage.add_argument(
        "--jpeg-quality",
        type=int,
        default=PreprocessConfig.jpeg_quality,
        metavar="N",
        help="quality for --image-storage jpeg, 1 to 100",
    )
    storage.add_argument(
        "--jpeg-subsampling",
        choices=("420", "444"),
        default=PreprocessConfig.jpeg_subsampling,
        help="color resolution for --image-storage jpeg: 420 halves it in width and height, 444 keeps it",
    )
    _add_settings(storage, settings, decides_rows=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        family = flag_value(argv, "--family") or DEFAULT_FAMILY  # which has flags of its own
        flags = vars(build_parser(family).parse_args(argv))
        settings = {name: flags.pop(name) for name in find_family(family).image_flags}
        upright = not flags.pop("ignore_exif_orientation")
        prefix = flags.pop("output_prefix").removesuffix(MANIFEST)
        config = PreprocessConfig(apply_exif=upright, image_settings=settings, output_prefix=prefix, **flags)
        started = time.monotonic()
        info = preprocess(config)
        print(format_summary(info, prefix))
        print(format_next(info, prefix, config.tokenizer_model, time.monotonic() - started))
        return 0

    return run_command(work, stopped="stopped; no dataset was written")


if __name__ == "__main__":
    sys.exit(main())
