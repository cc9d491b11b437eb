"""Tasks that ask for pictures and score them, read from the files of this folder.

A file has a task (`PictureTask`), or a group of tasks of any harness: `group`, and their names under `task`. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_eve.evaluation.requests import TOWER_KINDS
from megatron_eve.inference.sampling import GREEDY, GUIDANCE, Sampling


@dataclass(frozen=True)
class PictureTask:
    """A task.

    Attributes:
        task: its name.
        kind: of its requests.
        dataset_path: the dataset's folder below the data root.
        protocol: as a table names it.
        metric: that stands for it in a table.
        split: of a dataset in the hub's layout; None of one with prompts in meta_data.json.
        guidance, sampling: how pictures are drawn.
        templates: texts of a class, with {} for its name.
        published: the metric of other models, by name, as their papers have it.
        judge: of pictures that a judge alone scores, how it is asked (`scorers.judged.RULES`); else empty.
    """

    task: str
    kind: Literal["draw", "reconstruct", "classify"]
    dataset_path: str
    protocol: str
    metric: str
    split: str | None = None
    guidance: float = GUIDANCE
    sampling: Sampling = GREEDY
    templates: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)
    judge: str = ""

    @property
    def of_tower(self) -> bool:
        """Is it answered by a tower, without a language model?"""
        return self.kind in TOWER_KINDS

    @property
    def is_frechet(self) -> bool:
        """Is it scored by a Frechet distance?"""
        return self.kind != "classify" and not self.judge


@cache
def _files() -> list[dict[str, Any]]:
    """The content of the files, in the order of their names."""
    paths = sorted(Path(__file__).parent.glob("*.yaml"))
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]


def _task(fields: dict[str, Any]) -> PictureTask:
    given = dict(fields)
    names = ("temperature", "top_k", "top_p", "seed")
    sampling = Sampling(**{name: given.pop(name) for name in names if name in given})
    templates = tuple(given.pop("templates", ()))
    return PictureTask(**given, sampling=sampling, templates=templates)


PICTURE_TASKS = {one["task"]: _task(one) for one in _files() if "group" not in one}
"""By the names that --tasks takes."""
PICTURE_GROUPS = {one["group"]: tuple(one["task"]) for one in _files() if "group" in one}
"""Groups, with the names of their tasks."""
