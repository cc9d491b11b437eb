#!/usr/bin/env python
"""Write the codes of the pictures of a dataset, for models that read pictures as codes of a visual tokenizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.data.format.code_part import CODES, CODES_MANIFEST
from megatron_eve.data.format.manifest import MANIFEST
from megatron_eve.data.format.output import check_prefix
from megatron_eve.data.tokenizing.config import TokenizeConfig
from megatron_eve.data.tokenizing.flags import add_tower_flags, read_tower, tower_family
from megatron_eve.data.tokenizing.tokenize import Outcome, tokenize
from megatron_eve.runtime.command_line import CommandParser, whole_number
from megatron_eve.runtime.errors import run_command
from megatron_eve.runtime.ranks import global_rank

DESCRIPTION = """\
Write the codes of the pictures of a dataset, for models that read pictures as codes of a visual tokenizer.

Every picture of the dataset becomes a square, and the tower makes h x w positions of D codes of it. OUT_codes.bin gets
them as 16-bit numbers in the order of the pictures, and OUT_codes.json, written last, says what they were made of and
with. The dataset is not changed. A picture that does not decode gets the codes of the placeholder image and is counted.

The work is cut into chunks of pictures. The same command may run several times at once, as ranks of torchrun or as
tasks of a Slurm array (slurm/tokenize_images.sh): each takes chunks that no other has, and the one that makes the last
chunk puts the codes in place. After a kill the same command goes on with the chunks that are missing; the codes are the
same, whatever the number of processes. The exit status is 0 if the codes are there or other commands still make some.
"""
EXAMPLES = """\
python tools/tokenize_images.py --tower models/tower \\
    --input data/captions
torchrun --nproc-per-node 8 tools/tokenize_images.py --tower models/tower \\
    --input data/laion --output-prefix data/laion_squares --fit square \\
    --dtype bfloat16 --micro-batch-size 64
"""


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The flags, with those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    add_tower_flags(parser, family, of_dataset=True)
    files = parser.add_argument_group("input and output", "Which pictures, and where their codes go.")
    files.add_argument(
        "--input",
        required=True,
        metavar="PREFIX",
        help="the dataset: the --output-prefix of tools/preprocess_data.py or tools/merge_datasets.py",
    )
    files.add_argument(
        "--output-prefix",
        metavar="OUT",
        help="prefix of the codes: OUT_codes.bin and OUT_codes.json are written (default: that of the dataset, where "
        "other tools look for them)",
    )
    files.add_argument(
        "--overwrite",
        action="store_true",
        help="replace codes that are there and were made with something else, or are damaged; they open until the new "
        "ones are complete",
    )
    speed = parser.add_argument_group("speed", "How the work is shared out.")
    speed.add_argument(
        "--micro-batch-size",
        type=whole_number(1),
        default=16,
        metavar="N",
        help="pictures that go through the tower together; all processes must have the same",
    )
    speed.add_argument(
        "--workers",
        type=whole_number(1),
        default=0,
        metavar="N",
        help="processes of this command (of each rank under torchrun), each with a copy of the tower (default: 1 with "
        "a GPU, else one for each CPU core, at most 8)",
    )
    return parser


def tokenize_config(flags: argparse.Namespace, family: str | None) -> TokenizeConfig:
    """The settings that the flags say.

    Raises:
        UserError: a folder that is no tower, or a prefix at which nothing can be written.
    """
    prefix = flags.input.removesuffix(MANIFEST)
    output = (flags.output_prefix or prefix).removesuffix(CODES_MANIFEST)
    check_prefix(output)
    tower = read_tower(flags, family)
    return TokenizeConfig(
        family=tower.family,
        tower=tower.settings,
        square_size=tower.codes.square_size(tower.settings),
        input=prefix,
        output_prefix=output,
        overwrite=flags.overwrite,
        fit=flags.fit,
        dtype=flags.dtype,
        micro_batch_size=flags.micro_batch_size,
        workers=flags.workers,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        family = tower_family(argv)
        flags = build_parser(family).parse_args(argv)
        config = tokenize_config(flags, family)
        outcome = tokenize(config)
        if global_rank() == 0 or outcome.finished:
            print(summary(outcome, config.output_prefix))
        return 0

    return run_command(work, stopped="stopped; the same command goes on with what is missing")


def summary(outcome: Outcome, prefix: str) -> str:
    """What was done, as text."""
    info, rows = outcome.info, []
    if outcome.images:
        rate = outcome.images / max(outcome.seconds, 1e-9)
        shown = f"{rate:,.1f}" if rate >= 10 else f"{rate:.2f}"
        rows.append(("made", f"{outcome.images:,} images in {outcome.seconds:,.1f} s: {shown} images/s"))
    if info is None:
        rows.append(
            (
                "left",
                f"{outcome.left:,} images that other processes make, of which the last writes {prefix}{CODES}",
            )
        )
    else:
        height, width, depth = info.image_shape
        there = "" if outcome.images else ", which were there already: nothing to do"
        rows.append(
            (
                "codes",
                f"{prefix}{CODES}: {info.num_images:,} images of {height} x {width} x {depth} codes below "
                f"{info.codebook_size:,}, {info.image_bytes:,} bytes each{there}",
            )
        )
        if info.num_damaged:
            some = "; ".join(info.damaged_first[:2])
            rows.append(("damaged", f"{info.num_damaged:,} have the codes of the placeholder image: {some}"))
        rows.append(("tower", f"sha256 {info.tower_sha256[:12]}..., {info.dtype}, fit {info.fit}"))
    return "\n".join(f"{name:<9} {value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(main())
