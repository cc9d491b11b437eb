"""Flags of the tools that make codes of pictures: which tower, and how it sees them. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_eve.config.early_flags import flag_value
from megatron_eve.config.errors import ConfigError
from megatron_eve.data.images.squares import AUTO, FITS
from megatron_eve.models.image_codes import CodeTower, ImageCodes
from megatron_eve.models.registry import FamilyError, code_families, find_image_codes


class NamedTower(NamedTuple):
    """The tower of a command.

    Attributes:
        family: name of its model family.
        codes: what the family says of its towers.
        settings: what its folder says.
    """

    family: str
    codes: ImageCodes
    settings: CodeTower


def tower_family(argv: Sequence[str] | None) -> str | None:
    """The model family of the tower, which has flags of its own: as `--family` says, or the only one; None else.

    Raises:
        FamilyError: there is no such family, or it has no towers that make codes.
    """
    name = flag_value(argv, "--family")
    if name is None:
        names = code_families()
        return names[0] if len(names) == 1 else None
    find_image_codes(name)
    return name


def add_tower_flags(parser: argparse.ArgumentParser, family: str | None, *, of_dataset: bool = False) -> None:
    """Add the flags, those of the family among them (`tower_family`).

    Args:
        of_dataset: the pictures are a dataset's, which marks those that are to be drawn: their fit may follow.
    """
    tower = parser.add_argument_group("tower", "What makes the codes, and how it sees a picture.")
    codes = find_image_codes(family) if family else None
    tower.add_argument(
        "--tower",
        required=True,
        type=Path,
        metavar="DIR",
        help=codes.tower if codes else "folder of the tower; with --family this page says of which kind",
    )
    tower.add_argument(
        "--family",
        metavar="NAME",
        help="model family of the tower (default: the only one whose towers make codes)",
    )
    if codes:
        codes.add_flags(tower)
    tower.add_argument(
        "--fit",
        choices=(AUTO, *FITS) if of_dataset else FITS,
        default=AUTO if of_dataset else FITS[0],
        help="how a picture becomes a square. stretch: its aspect ratio is lost, as of pictures that are read; square: "
        "the middle of a wide picture, the top of a tall one, as of pictures to draw"
        + (
            "; auto: square for those that the dataset marks as to be drawn, stretch for the others"
            if of_dataset
            else ""
        ),
    )
    tower.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="precision of the tower; bfloat16 is faster on GPUs, and changes some codes",
    )


def read_tower(flags: argparse.Namespace, family: str | None) -> NamedTower:
    """Read the folder of the tower.

    Raises:
        UserError: it is no tower, or a family has to be named.
    """
    codes = find_image_codes(family) if family else None
    if family is None or codes is None:
        raise FamilyError(f"--family: name the family of the tower, one of {', '.join(code_families())}")
    if not flags.tower.is_dir():
        raise ConfigError(f"--tower {flags.tower}: no such folder; name that of a tower")
    return NamedTower(family, codes, codes.read_tower(flags.tower, vars(flags)))
