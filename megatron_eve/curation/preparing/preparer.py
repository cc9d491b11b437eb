"""`Preparer`, the base class of readers of one published download.

A preparer finds the files of the layout that is published and opens a `Source` (`data/sources/source.py`) over them.
What is the same for all downloads is in `prepare.py`: shards, pictures' bytes, licences, opt-out, counts.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from megatron_eve.curation.preparing.splits import without_eval_splits
from megatron_eve.data.errors import DataError
from megatron_eve.data.sources.source import Source

_PICKLES = (".pkl", ".pickle")


@dataclass
class Preparer(ABC):
    """Reader of one published download. A subclass is a dataclass, too.

    Fields that a subclass adds are settings that decide the rows, each with a flag (`add_flags`).

    Attributes:
        name: of the preparer on the command line, and `source` of its records unless they name another.
        what: the download, for the list of preparers.
        layout: the files that are expected below `folder`, for the help and for messages.
        license: of the data set by its card or paper, put into `meta` of rows that have none; None where the card
            names none, or the rows do.
        folder: the download (--source).
        allow_eval_splits: take files and rows of test and validation splits, too.
        left_out: files of test and validation splits that `find` left out.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    layout: ClassVar[str]
    license: ClassVar[str | None] = None

    folder: Path
    allow_eval_splits: bool = False
    left_out: list[Path] = field(default_factory=list, init=False, repr=False, compare=False)

    @classmethod  # noqa: B027  most have no flags of their own
    def add_flags(cls, group: argparse._ArgumentGroup) -> None:
        """Add a flag for each field of the subclass; its destination is the name of the field."""

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> Self:
        """The preparer that the flags of the command describe."""
        own = {one.name: getattr(flags, one.name) for one in fields(cls) if one.init and one.name != "folder"}
        return cls(folder=flags.source, **own)

    def settings(self) -> dict[str, Any]:
        """Settings that decide the rows, as JSON values by their names."""
        return {
            one.name: getattr(self, one.name) for one in fields(self) if one.init and one.name != "folder"
        }

    @property
    def image_root(self) -> Path | None:
        """Folder that the paths of pictures in records are relative to; None where records hold the bytes."""
        return None

    @abstractmethod
    def files(self) -> list[Path]:
        """Files that the rows are read from, in the order of the rows.

        Raises:
            DataError: the folder lacks files of the layout.
        """

    @abstractmethod
    def open(self, files: Sequence[Path]) -> Source:
        """The source that reads these files. It is pickled to the processes that parse rows.

        Raises:
            DataError: something beside the files is missing or damaged.
        """

    def dead_links(self) -> int:
        """Pictures that the download lists and that could not be downloaded, where it says so in a file of its own."""
        return 0

    def find(self, *patterns: str) -> list[Path]:
        """Files below the folder that match one of the patterns, sorted by name; those of eval splits are left out.

        Args:
            patterns: as of `Path.glob`, such as `**/sa_*.tar`.

        Raises:
            DataError: there is no such folder, no such file, or none but those of test and validation splits.
        """
        if not self.folder.is_dir():
            raise DataError(
                f"--source {self.folder} is not a folder: name that of the download, with {self.layout}"
            )
        found = sorted({file for pattern in patterns for file in self.folder.glob(pattern) if file.is_file()})
        if not found:
            raise self.missing(" or ".join(pattern.removeprefix("**/") for pattern in patterns))
        if self.allow_eval_splits:
            return found
        training, evaluation = without_eval_splits(found, self.folder)
        if not training:
            raise DataError(
                f"--source {self.folder} has files of test or validation splits only, such as {evaluation[0].name}: "
                "download the training split, or add --allow-eval-splits"
            )
        self.left_out += evaluation
        return training

    def missing(self, what: str) -> DataError:
        """The error of a download that lacks files.

        Args:
            what: the files that are missing, relative to the folder.
        """
        only = " (pickles are there, and are never opened, as they can run code)" * _has_pickles(self.folder)
        return DataError(f"--source {self.folder} has no {what}{only}: {self.name} expects {self.layout}")


def _has_pickles(folder: Path) -> bool:
    return any(file.suffix in _PICKLES for file in folder.iterdir())
