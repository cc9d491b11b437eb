"""Which files and rows of a download belong to a test or validation split, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_SPLIT = re.compile(r"(?:test|val|valid|validation|dev|eval|minival|testdev)\d*")


def is_eval_split(name: str) -> bool:
    """Whether a name says test or validation split: one of its words is test, val, validation, dev or eval.

    Args:
        name: value of a split column, or path of a file below its download: `val_easy_qa.json`, `val2014/1.jpg`,
            `validation-00000-of-00002.parquet`.
    """
    return any(_SPLIT.fullmatch(word) for word in re.split(r"[^a-z0-9]+", name.lower()))


def without_eval_splits(files: Iterable[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Separate files into those of training splits and those of test and validation splits.

    Args:
        files: below `folder`.
        folder: of the download; its own name does not count.
    """
    training: list[Path] = []
    evaluation: list[Path] = []
    for file in files:
        (evaluation if is_eval_split(str(file.relative_to(folder))) else training).append(file)
    return training, evaluation
