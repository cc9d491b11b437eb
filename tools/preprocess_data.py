#!/usr/bin/env python
"""Make an indexed dataset from conversations in the LLaVA layout and their image files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_eve.data.preprocess import PreprocessConfig, format_summary, preprocess
from megatron_eve.errors import run_command

DESCRIPTION = """\
Make an indexed dataset from conversations in the LLaVA layout and their image files.

Each row is an object with
  "id"             anything
  "image"          (or "images") a file name under --image-root, or a list of them, or absent
  "conversations"  [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]
with one <image> in the text for each image. Rows that cannot be used are left out, counted by reason in the
summary and listed in OUT_skipped.jsonl. The exit status is 0 if any row was kept.
"""
EPILOG = """\
example:
  python tools/preprocess_data.py --input captions.json --image-root photos \\
      --tokenizer-model vicuna-7b/tokenizer.model --output-prefix data/captions --workers 8
"""


def build_parser() -> argparse.ArgumentParser:
    """The flags, one for each field of PreprocessConfig."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=DESCRIPTION, epilog=EPILOG, formatter_class=formatter)
    needed = parser.add_argument_group("what to read and write")
    needed.add_argument(
        "--input", required=True, metavar="FILE", help="a JSON array, or one row a line (.jsonl)"
    )
    needed.add_argument("--image-root", required=True, metavar="DIR", help="image names are relative to it")
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
    text = parser.add_argument_group("text")
    text.add_argument(
        "--template",
        choices=("plain", "vicuna_v1"),
        default=PreprocessConfig.template,
        help="plain: captions, stages 1 and 2; vicuna_v1: conversations, stage 3 (default: %(default)s)",
    )
    text.add_argument(
        "--model-max-length",
        type=int,
        default=PreprocessConfig.model_max_length,
        metavar="N",
        help="cut texts at N tokens, an image being one; 4096 for the HD model (default: %(default)s)",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--image-size",
        type=int,
        default=PreprocessConfig.image_size,
        metavar="PX",
        help="long side for the model: 672, or 1344 for the HD model (default: %(default)s)",
    )
    images.add_argument(
        "--teacher-size",
        type=int,
        default=PreprocessConfig.teacher_size,
        metavar="PX",
        help="side for the teacher (default: %(default)s)",
    )
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
    storage = parser.add_argument_group("how images are stored")
    storage.add_argument(
        "--image-storage",
        choices=("encoded", "jpeg", "pixels"),
        default=PreprocessConfig.image_storage,
        help="encoded: the files as they are; jpeg: JPEG files at --image-size where that is smaller; pixels: decoded, "
        "for --image-size, --teacher-size and --teacher-patch-size alone (default: %(default)s)",
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
    storage.add_argument(
        "--teacher-patch-size",
        type=int,
        default=PreprocessConfig.teacher_patch_size,
        metavar="PX",
        help="side of the teacher's own patches, for pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that tokenise and decode (default: the machine's cores, at most 8: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    flags = vars(build_parser().parse_args(argv))
    config = PreprocessConfig(apply_exif=not flags.pop("ignore_exif_orientation"), **flags)

    def work() -> int:
        print(format_summary(preprocess(config), config.output_prefix))
        return 0

    try:
        return run_command(work)
    except KeyboardInterrupt:
        print("stopped; no dataset was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
