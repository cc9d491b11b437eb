#!/usr/bin/env python
"""Make an indexed dataset from rows of text and pictures, in the layouts in which data sets are published."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, format_summary, preprocess
from megatron_eve.data.sources.recognise import FORMATS
from megatron_eve.models.family import SizeFlag
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Make an indexed dataset from rows of text and pictures. The layout of the input is recognised:

  llava        .json, .jsonl, .ndjson: an array, or a line each, of {"id", "image": a file name, a list or absent,
               "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}, with one
               <image> in the text for each image; or "video": a file name, in place of "image"
  webdataset   .tar: shards of img2dataset (LAION, COYO) and of video2dataset (WebVid), and SA-1B's
  parquet      .parquet: data sets of the Hugging Face hub with an image and a caption, or with conversations; and
               shards of records (docs/data.md)
  mmc4         .jsonl: documents with pictures between their sentences
  text         .jsonl: {"text"}, or {"inputs", "targets"}
  open_images  .csv: OpenImages' list of pictures
  video        .mp4, .webm, .mkv, .mov, .avi: a row each, its caption in clip.txt beside clip.mp4, or in clip.json

Rows that cannot be used are left out, counted by reason in the summary and listed in OUT_skipped.jsonl. What a source
says of a row beside its text and pictures goes to OUT_meta.parquet. The exit status is 0 if any row was kept. Nothing
is extracted or downloaded.
"""
EPILOG = """\
examples:
  python tools/preprocess_data.py --input captions.json --image-root photos \\
      --tokenizer-model vicuna-7b/tokenizer.model --output-prefix data/captions --workers 8
  python tools/preprocess_data.py --input 'laion/*.tar' \\
      --tokenizer-model vicuna-7b/tokenizer.model --output-prefix data/laion --workers 8
"""


def build_parser(family: str = DEFAULT_FAMILY) -> argparse.ArgumentParser:
    """The flags, one for each field of PreprocessConfig and for each image size of the family.

    Raises:
        FamilyError: there is no such family.
    """
    sizes = find_family(family).image_flags
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    _add_input(parser)
    _add_text(parser)
    _add_images(parser, family, sizes)
    _add_storage(parser, sizes)
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that tokenise and decode (default: the machine's cores, at most 8: %(default)s)",
    )
    return parser


def _add_input(parser: argparse.ArgumentParser) -> None:
    """Flags of what is read and written."""
    needed = parser.add_argument_group("what to read and write")
    needed.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help="one or more files of one layout, or patterns in quotation marks; those of a pattern are sorted by name",
    )
    needed.add_argument(
        "--input-format", choices=tuple(FORMATS), help="their layout, where it is not recognised (see above)"
    )
    needed.add_argument(
        "--image-root",
        metavar="DIR",
        help="names of images and videos are relative to it; not needed where the input holds them (webdataset, "
        "parquet, video)",
    )
    needed.add_argument("--tokenizer-model", required=True, metavar="FILE", help="Llama's tokenizer.model")
    needed.add_argument(
        "--output-prefix",
        required=True,
        metavar="OUT",
        help="writes OUT_text.bin, OUT_image.bin, OUT_dataset.json ...",
    )
    needed.add_argument(
        "--follow-links",
        action="store_true",
        help="take images that are links to files outside DIR, as in Hugging Face's cache (snapshots/, blobs/)",
    )
    needed.add_argument(
        "--drop-license",
        nargs="+",
        default=(),
        metavar="PATTERN",
        help="leave out rows whose license matches, such as '*-nc-*' (case does not matter); rows without one are kept",
    )
    needed.add_argument(
        "--opt-out",
        metavar="FILE",
        help="leave out rows whose id, URL or picture (sha256 of its file) stands in this file, one a line",
    )


def _add_text(parser: argparse.ArgumentParser) -> None:
    """Flags of texts."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--template",
        choices=("plain", "vicuna_v1", "document"),
        default=PreprocessConfig.template,
        help="plain: captions; vicuna_v1: conversations; document: all of a text trains, with pictures in it or "
        "without (MMC4, pairs, text) (default: %(default)s)",
    )
    text.add_argument(
        "--model-max-length",
        type=int,
        default=PreprocessConfig.model_max_length,
        metavar="N",
        help="cut texts at N tokens, an image being one (default: %(default)s)",
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_sizes(group: argparse._ArgumentGroup, sizes: Mapping[str, SizeFlag], pixels_alone: bool) -> None:
    """Flags of the image sizes of a family: those that change decoded pixels alone, or the others."""
    for name, size in sizes.items():
        if size.pixels_alone == pixels_alone:
            group.add_argument(
                _flag(name),
                type=int,
                default=size.default,
                metavar="PX",
                help=f"{size.help} (default: %(default)s)",
            )


def _add_images(parser: argparse.ArgumentParser, family: str, sizes: Mapping[str, SizeFlag]) -> None:
    """Flags of pictures."""
    images = parser.add_argument_group("images")
    images.add_argument(
        "--family", default=family, help="model family that the dataset is for (default: %(default)s)"
    )
    _add_sizes(images, sizes, pixels_alone=False)
    images.add_argument(
        "--ignore-exif-orientation",
        action="store_true",
        help="take pictures as they are stored, as the published model did, rather than upright",
    )
    images.add_argument(
        "--max-image-pixels",
        type=int,
        default=PreprocessConfig.max_image_pixels,
        metavar="N",
        help="leave out larger pictures, width x height, before decoding them (default: %(default)s)",
    )
    images.add_argument(
        "--video-frames",
        type=int,
        default=PreprocessConfig.video_frames,
        metavar="N",
        help="pictures that a video becomes: N frames from its first to its last, evenly spaced in time (default: "
        "%(default)s)",
    )


def _add_storage(parser: argparse.ArgumentParser, sizes: Mapping[str, SizeFlag]) -> None:
    """Flags of how pictures are stored."""
    *others, last = map(_flag, sizes)
    every = f"{', '.join(others)} and {last}" if others else last
    storage = parser.add_argument_group("how images are stored")
    storage.add_argument(
        "--image-storage",
        choices=("encoded", "jpeg", "pixels"),
        default=PreprocessConfig.image_storage,
        help="encoded: the files as they are; jpeg: JPEG files at the model's size where that is smaller; pixels: "
        f"decoded, for {every} alone (default: %(default)s)",
    )
    storage.add_argument(
        "--image-decoder",
        choices=("auto", "dali", "threads", "pillow"),
        default=PreprocessConfig.image_decoder,
        help="for jpeg and pixels; auto: DALI where there is a GPU, else threads (default: %(default)s)",
    )
    storage.add_argument(
        "--jpeg-quality",
        type=int,
        default=PreprocessConfig.jpeg_quality,
        metavar="Q",
        help="of jpeg, 1 to 100 (default: %(default)s)",
    )
    storage.add_argument(
        "--jpeg-subsampling",
        choices=("420", "444"),
        default=PreprocessConfig.jpeg_subsampling,
        help="of jpeg's colours: 420 halves their width and height, 444 keeps them (default: %(default)s)",
    )
    _add_sizes(storage, sizes, pixels_alone=True)


def _named_family(argv: Sequence[str] | None) -> str:
    """The family that the command line names: it is read first, since the flags of sizes are its own."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--family", default=DEFAULT_FAMILY)
    return str(parser.parse_known_args(argv)[0].family)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        family = _named_family(argv)
        flags = vars(build_parser(family).parse_args(argv))
        sizes = {name: flags.pop(name) for name in find_family(family).image_flags}
        upright = not flags.pop("ignore_exif_orientation")
        config = PreprocessConfig(apply_exif=upright, image_sizes=sizes, **flags)
        print(format_summary(preprocess(config), config.output_prefix))
        return 0

    return run_command(work, stopped="stopped; no dataset was written")


if __name__ == "__main__":
    sys.exit(main())
