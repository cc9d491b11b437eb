"""`comparison.yaml`: what `tools/compare_losses.py` needs beside the recipes of a folder, `stage1.yaml` and so on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_eve.runtime.errors import UserError

FILE = "comparison.yaml"


@dataclass(frozen=True)
class Example:
    """The contents of `comparison.yaml`. In words, `{inputs}` stands for the folder of what is made once.

    Attributes:
        templates: stage -> `--template` of the dataset that it trains on.
        starts_with: the stage whose first checkpoint all runs start from.
        preprocessing: further flags of `tools/preprocess_data.py`.
        commands: run once before anything trains, each a Python script and its arguments.
        flags: further flags of every training run.
    """

    templates: dict[int, str]
    starts_with: int
    preprocessing: tuple[str, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that have a recipe, `stageN.yaml`."""
        return tuple(sorted(self.templates))


def read_example(folder: Path) -> Example:
    """Read `comparison.yaml` of a folder of recipes.

    Raises:
        UserError: it is missing, or is not what `Example` describes; names the file.
    """
    path = folder / FILE
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--example {folder}: has no {FILE}; name a folder with one, as examples/ has"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--example {folder}: {FILE} cannot be read ({error})") from error
    try:
        example = Example(
            templates={int(stage): str(template) for stage, template in tree.pop("templates").items()},
            starts_with=int(tree.pop("starts_with")),
            preprocessing=_words(tree.pop("preprocessing", [])),
            commands=tuple(_words(command) for command in tree.pop("commands", [])),
            flags=_words(tree.pop("flags", [])),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: needs templates (stage: template) and starts_with (a stage), and may have preprocessing, "
            f"commands and flags, which are lists of words ({type(error).__name__}: {error})"
        ) from error
    if tree:
        raise UserError(f"{path}: {', '.join(map(str, tree))}: no such setting; remove it")
    for stage in (example.starts_with, *example.stages):
        if stage not in example.templates or not (folder / f"stage{stage}.yaml").is_file():
            raise UserError(f"{path}: stage {stage} needs a template and {folder / f'stage{stage}.yaml'}")
    return example


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return tuple(map(str, value))
