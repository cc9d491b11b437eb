"""`Stage`, the interface of a stage of the curation."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar

from megatron_eve.curation.work import Work


@dataclasses.dataclass(frozen=True)
class Stage(ABC):
    """One stage. Subclasses are frozen dataclasses whose fields are the stage's settings; they must pickle.

    Attributes:
        name: of the stage, one of STAGES.
        per_shard: each shard is a task of its own; otherwise one task makes the files of all shards, as task 0.
        suffixes: of the files that the stage writes for a shard, behind its five-digit number.
        files: names of files that the stage writes once, in its folder. Only a stage of one task has them.
        needs: stages that must have been run before it.
        workers: tasks that run at a time unless --workers says so; None for one on each CPU core.
    """

    name: ClassVar[str]
    per_shard: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    files: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("filter",)
    workers: ClassVar[int | None] = None

    def settings(self) -> dict[str, Any]:
        """The settings that decide the results, as JSON values: all fields, unless a stage says otherwise."""
        return dataclasses.asdict(self)

    def check(self, work: Work) -> None:  # noqa: B027  most stages have nothing to check
        """Look for mistakes before the first task starts, without changing anything.

        Raises:
            UserError: the stage cannot be run with these settings in this work folder.
        """

    @abstractmethod
    def run(self, work: Work, shard: int) -> Counter[str]:
        """Make the files of one shard (a stage of one task: all files), each in a `work.output` block.

        Args:
            work: the curation.
            shard: number of the shard; 0 for a stage of one task.

        Returns:
            Counts, which are added up over the shards for `report`.

        Raises:
            DataError: a file cannot be used.
        """

    def report(self, work: Work) -> list[tuple[str, str]]:
        """Rows of the summary, (label, text), once all shards are finished; it may write a page, too."""
        return []
