"""The tower of a model that reads pictures as codes: its flags, and what is wrong with it before the model is loaded.

Imports no torch; `picture_codes.py` has the tower with its weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from megatron_eve.config import ConfigError, RunConfig, from_saved
from megatron_eve.inference.checkpoint_model import read_saved
from megatron_eve.models.image_codes import CodeTower
from megatron_eve.models.image_plan import CodeSizes
from megatron_eve.models.registry import find_family, find_image_codes


class ModelTower(NamedTuple):
    """The tower of a model.

    Attributes:
        family: name of its model family.
        settings: what its folder says.
        dtype: in which it made the codes of the model's data; "float32" where that is not known.
        sha256: fingerprint of the one that made these; None where that is not known.
    """

    family: str
    settings: CodeTower
    dtype: str = "float32"
    sha256: str | None = None

    def check_weights(self) -> str:
        """Compare its fingerprint, which is returned. It reads the weights, so one rank does.

        Raises:
            ConfigError: weights that are missing or damaged, or another tower.
        """
        found = find_image_codes(self.family).sha256(self.settings)
        if self.sha256 not in (None, found):
            raise ConfigError(
                f"--tower {self.settings.folder}: is another tower (sha256 {found[:12]}...) than the one that made the "
                f"codes of the model's data ({str(self.sha256)[:12]}...); name that one"
            )
        return found


def add_tower_flags(group: argparse._ActionsContainer, family: str | None) -> None:
    """The flags that say which tower makes codes of pictures, and pictures of codes.

    Args:
        group: of the flags.
        family: whose towers need flags of their own (`data.tokenizing.flags.tower_family`).
    """
    group.add_argument(
        "--tower",
        type=Path,
        metavar="DIR",
        help="of a model that reads pictures as codes: folder of the tower that made the codes of its data (default: "
        "the one whose path the checkpoint holds)",
    )
    group.add_argument("--family", metavar="NAME", help="model family of --tower, whose flags are shown here")
    if family:
        find_image_codes(family).add_flags(group)


def model_tower(flags: argparse.Namespace, *, needed: bool) -> ModelTower | None:
    """The tower of the model that a command opens.

    Args:
        flags: of `opening.add_model_flags` and `add_tower_flags`, checked.
        needed: refuse a model without one; else a tower that is not known and not named is None.

    Returns:
        None, too, where the model reads no codes.

    Raises:
        ConfigError: a tower that is not there, or is not the model's; one sentence with the remedy.
    """
    saved = read_saved(flags.model_path)
    if "config" not in saved:
        # A folder for transformers, or a damaged checkpoint, of which the opening says it.
        if flags.tower is not None:
            raise ConfigError(
                f"--tower: {flags.model_path} is no checkpoint, which alone needs one; leave this out"
            )
        return None
    config, _ = from_saved(saved["config"], str(flags.model_path))
    if not find_family(config.family).reads_codes:
        if flags.tower is not None:
            raise ConfigError(
                f"--tower: a model of the family {config.family} reads pictures without codes; leave this out"
            )
        return None
    try:
        return find_tower(flags, config, saved)
    except ConfigError:
        if needed or flags.tower is not None:
            raise
        return None


def find_tower(flags: argparse.Namespace, config: RunConfig, saved: dict[str, Any]) -> ModelTower:
    """The tower of a run's model: `--tower`, or the one that the checkpoint names.

    Args:
        flags: of `add_tower_flags`.
        config: of the run; its family reads codes.
        saved: what the checkpoint's `common.pt` holds.

    Raises:
        ConfigError: it is not known or not there, or has codes of other sizes.
    """
    family = find_family(config.family)
    if flags.tower is None and (given := _given(config.family, flags)):
        raise ConfigError(f"--{given.replace('_', '-')} is of --tower, which is not given; add both")
    try:
        tower = (
            family.code_tower(config)
            if flags.tower is None
            else find_image_codes(config.family).read_tower(flags.tower, vars(flags))
        )
        if tower is None:
            raise ConfigError("the checkpoint names no tower, which makes codes and pictures")
    except ConfigError as error:
        raise ConfigError(f"--tower: {error}; name the folder of the model's tower") from None
    sizes = family.code_sizes(config)
    assert sizes is not None, "the family reads codes"
    theirs = tower.grid, tower.depth, tower.codebook_size
    if theirs != tuple(sizes):
        raise ConfigError(
            f"--tower {tower.folder}: has codes of {_shown_sizes(*theirs)}, and the model's are "
            f"{_shown_sizes(*sizes)}; name the tower that made the codes of the model's data"
        )
    data = saved.get("dataset") or {}
    dtypes = data.get("code dtypes", ())
    frozen = saved.get("frozen") or {}  # an import has this alone
    sha256 = data.get("code tower") or frozen.get("sha256")
    return ModelTower(config.family, tower, dtypes[0] if len(dtypes) == 1 else "float32", sha256)


def _given(family: str, flags: argparse.Namespace) -> str | None:
    """A flag of the family's towers that is given, by name; None if none is."""
    alone = argparse.ArgumentParser(add_help=False)
    find_image_codes(family).add_flags(alone)
    defaults = vars(alone.parse_args([]))
    return next((name for name, value in defaults.items() if getattr(flags, name, value) != value), None)


def drawn_sizes(config: RunConfig) -> CodeSizes:
    """Sizes of the codes that a run's model draws.

    Raises:
        ConfigError: its family draws none.
    """
    sizes = find_family(config.family).code_sizes(config)
    if sizes is None:
        raise ConfigError(
            f"--model-path: a model of the family {config.family} draws no pictures; name one that does"
        )
    return sizes


def _shown_sizes(grid: tuple[int, int], depth: int, codebook_size: int) -> str:
    """Sizes of codes as text."""
    return f"{grid[0]} x {grid[1]} x {depth}, each of {codebook_size}"
