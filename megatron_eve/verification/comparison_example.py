"""What tools/compare_losses.py trains: recipes of a toy model, and what their runs read. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.runtime.errors import UserError


@dataclass(frozen=True)
class ComparisonExample:
    """A toy model to compare with: a folder with the recipe of each stage (stage1.yaml) and a compare_losses.json.

    In words of commands, {inputs} stands for the folder of what the runs read.

    Attributes:
        folder: from the root of a tree.
        templates: of the data, by stage.
        start: the stage whose first step makes the checkpoint that all runs start from.
        preprocess: flags of tools/preprocess_data.py.
        prepare: commands that make what the runs read beside data and tokenizer, each a Python file and its words.
        run: flags of every run.
    """

    folder: Path
    templates: dict[int, str]
    start: int
    preprocess: tuple[str, ...]
    prepare: tuple[tuple[str, ...], ...]
    run: tuple[str, ...]

    @staticmethod
    def read(root: Path, folder: Path) -> ComparisonExample:
        """Read its compare_losses.json.

        Args:
            root: of the tree that it is read from.
            folder: from there.

        Raises:
            UserError: there is none, or another one.
        """
        path = root / folder / "compare_losses.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return ComparisonExample(
                folder,
                {int(stage): template for stage, template in found["templates"].items()},
                found["start"],
                tuple(found["preprocess"]),
                tuple(tuple(words) for words in found["prepare"]),
                tuple(found["run"]),
            )
        except OSError as error:
            raise UserError(f"--example {folder}: {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--example {folder}: {path} is not as examples/eve_tiny has it ({error})"
            ) from None
