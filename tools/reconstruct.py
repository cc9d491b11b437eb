#!/usr/bin/env python
"""Show what a visual tokenizer keeps of pictures: originals beside the pictures that their codes give."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, ImageError, decode_image
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.data.images.squares import square_of
from megatron_eve.data.tokenizing.flags import NamedTower, add_tower_flags, read_tower, tower_family
from megatron_eve.runtime.command_line import CommandParser
from megatron_eve.runtime.errors import run_command

DESCRIPTION = """\
Show what a visual tokenizer keeps of pictures: originals beside the pictures that their codes give.

Each picture becomes a square, codes of D depths, and a picture again: from the codes of depth 1 alone, of depths 1 and
2, and so on. The sheet, a PNG, has a row for each picture: the square that the tower reads, then the reconstructions
with their peak signal-to-noise ratios (PSNR, in dB), which are printed, too.
"""
EXAMPLES = """\
python tools/reconstruct.py --tower models/tower --input photos/*.jpg \\
    --output sheet.png
"""


def build_parser(family: str | None) -> argparse.ArgumentParser:
    """The flags, with those that the towers of a family need."""
    parser = CommandParser(description=DESCRIPTION, examples=EXAMPLES)
    add_tower_flags(parser, family)
    files = parser.add_argument_group("files", "The pictures, and where the sheet goes.")
    files.add_argument(
        "--input",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="pictures, a row of the sheet each",
    )
    files.add_argument("--output", required=True, type=Path, metavar="FILE.png", help="file for the sheet")
    return parser


def read_squares(paths: Sequence[Path], fit: str, size: int) -> list[Pixels]:
    """The pictures as the tower reads them: uint8 [size, size, 3] each.

    Raises:
        ConfigError: one that cannot be read.
    """
    found = []
    for path in paths:
        try:
            picture = decode_image(path.read_bytes(), apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)
        except OSError as error:
            raise ConfigError(f"--input {path}: {error.strerror}; name files of pictures") from error
        except ImageError as error:
            raise ConfigError(f"--input {path}: {error.detail}; name files of pictures") from error
        found.append(square_of(picture, fit, size))
    return found


def run(
    tower: NamedTower, flags: argparse.Namespace, squares: Sequence[Pixels]
) -> list[tuple[str, list[float]]]:
    """Write the sheet; returns the name of each picture with its PSNR by depth."""
    import torch

    from megatron_eve.data.inspecting.reconstruction import draw_sheet, reconstruct
    from megatron_eve.data.tokenizing.worker import code_device

    device = code_device()
    model = tower.codes.load_tower(tower.settings, device, getattr(torch, flags.dtype))
    found = [
        reconstruct(model, path.name, square, device)
        for path, square in zip(flags.input, squares, strict=True)
    ]
    draw_sheet(found).save(flags.output)
    return [(one.name, one.psnr) for one in found]


def table(rows: Sequence[tuple[str, list[float]]]) -> str:
    """PSNR by picture and depth, in dB, and their means, as text."""
    width = max(len("PSNR in dB"), *(len(name) for name, _ in rows))
    lines = [(f"{'PSNR in dB':<{width}}", [f"depth {level + 1}" for level in range(len(rows[0][1]))])]
    means = [*np.mean([values for _, values in rows], axis=0)]
    for name, values in [*rows, ("mean", means)] if len(rows) > 1 else rows:
        lines.append((f"{name:<{width}}", [f"{value:.2f}" for value in values]))
    return "\n".join(name + "".join(f"{word:>10}" for word in words) for name, words in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""

    def work() -> int:
        family = tower_family(argv)
        flags = build_parser(family).parse_args(argv)
        if flags.output.suffix.lower() != ".png":
            raise ConfigError(f"--output {flags.output}: must end in .png")
        if not flags.output.absolute().parent.is_dir():
            raise ConfigError(f"--output {flags.output}: {flags.output.parent} is no folder; make it first")
        tower = read_tower(flags, family)
        squares = read_squares(flags.input, flags.fit, tower.codes.square_size(tower.settings))
        print(table(run(tower, flags, squares)))
        print(f"sheet     {flags.output}")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
