"""Which harness asks which task: the names that --tasks takes, and what they need."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import DataError
from megatron_eve.evaluation.answers import Answered, MissingAnswers
from megatron_eve.evaluation.data_root import (
    DatasetNeed,
    check_dataset,
    check_space,
    copies_folder,
    data_digest,
    pictures_digest,
)
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.picture_tasks import PICTURE_GROUPS, PICTURE_TASKS
from megatron_eve.evaluation.requests import Request
from megatron_eve.evaluation.text_tasks import TEXT_TASKS

if TYPE_CHECKING:
    from megatron_eve.evaluation.picture_harness import PictureHarness
    from megatron_eve.evaluation.text_harness import TextHarness
    from megatron_eve.evaluation.vision_harness import VisionHarness

GROUPS = {"forgetting": (*TEXT_TASKS, "forgetting_sqa"), **PICTURE_GROUPS}
"""Groups with tasks of several harnesses; those of lmms-eval's tasks alone are files beside these."""
_PACKAGES = ("megatron_eve", "lmms_eval", "lm_eval", "datasets", "transformers", "torch")


def check_installed() -> None:
    """Raise ConfigError where the harnesses are not installed."""
    missing = [name for name in ("lmms_eval", "lm_eval", "datasets") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed: make install-eval")


def ungrouped(names: Sequence[str]) -> list[str]:
    """Names with those of a group's tasks in its place."""
    return [one for given in names for one in GROUPS.get(given, (given,))]


class Harnesses:
    """The tasks of a run, and the harnesses that ask them, which are loaded when one of their tasks is asked for.

    Args:
        names: of tasks and groups.
        data_root: whose folders the tasks read.
        answers: folder of the answers, where they are scored.
        inception: file of the Inception network, for scores that need it.

    Raises:
        ConfigError: an unknown name, with those that are like it.
    """

    def __init__(
        self,
        names: Sequence[str],
        data_root: Path,
        answers: Path | None = None,
        inception: Path | None = None,
    ) -> None:
        self._root, self._answers, self._inception = data_root, answers, inception
        self.vision_tasks: list[str] = []
        self.text_tasks: list[str] = []
        self.picture_tasks: list[str] = []
        self._copies: dict[str, Path] = {}
        for name in ungrouped(names):
            if name in PICTURE_TASKS:
                self.picture_tasks.append(name)
            elif name in TEXT_TASKS:
                self.text_tasks.append(name)
            elif name in self.vision.names:
                self.vision_tasks += self.vision.tasks(name)
            else:
                known = [*TEXT_TASKS, *PICTURE_TASKS, *GROUPS, *self.vision.names]
                like = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(like)}?" if like else ""
                raise ConfigError(
                    f"--tasks {name}: no such task or group{hint}; tools/evaluate.py list shows them"
                )
        self.vision_tasks = list(dict.fromkeys(self.vision_tasks))
        self.text_tasks = list(dict.fromkeys(self.text_tasks))
        self.picture_tasks = list(dict.fromkeys(self.picture_tasks))

    @cached_property
    def vision(self) -> VisionHarness:
        """lmms-eval."""
        from megatron_eve.evaluation.vision_harness import VisionHarness

        return VisionHarness(self._root)

    @cached_property
    def text(self) -> TextHarness:
        """lm-eval."""
        from megatron_eve.evaluation.text_harness import TextHarness

        return TextHarness(self._root)

    @cached_property
    def pictures(self) -> PictureHarness:
        """Ours."""
        from megatron_eve.evaluation.picture_harness import PictureHarness

        return PictureHarness(self._root, self._answers, self._inception)

    @property
    def tasks(self) -> list[str]:
        """All of them, in the order of tables."""
        return [*self.vision_tasks, *self.text_tasks, *self.picture_tasks]

    def needs(self, task: str) -> list[DatasetNeed]:
        """What a task reads; all of it lies in one folder."""
        return self._harness(task).needs(task)

    def judged_tasks(self) -> list[str]:
        """Those whose answers a judge can grade."""
        return [
            *(task for task in self.vision_tasks if self.vision.metadata(task).get("judge")),
            *(task for task in self.picture_tasks if PICTURE_TASKS[task].judge),
        ]

    def check_data(self, cache: Path) -> dict[str, str]:
        """Check the datasets of all tasks, and the room for their copies; returns a digest of each folder, and of
        pictures that lie elsewhere.

        Called before `plan` and `score`.

        Raises:
            DataError: what is missing; ConfigError: no room.
        """
        needs = {task: self.needs(task) for task in self.tasks}
        files = {
            task: [path for need in needs[task] for path in check_dataset(self._root, need)] for task in needs
        }
        digests = {}
        for first in sorted((need[0] for need in needs.values()), key=lambda one: one.path):
            if first.path not in digests:
                digests[first.path] = data_digest(self._root / first.path, (".jpg",) if first.files else ())
        of_task = {task: digests[need[0].path] for task, need in needs.items()}
        of_digest: dict[str, list[Path]] = {}
        for task, digest in of_task.items():
            if task not in self.picture_tasks:  # whose files are read as they are
                of_digest.setdefault(digest, []).extend(files[task])
        check_space(cache, of_digest)
        self._copies = {task: copies_folder(cache, digest) for task, digest in of_task.items()}
        return digests | self._picture_digests()

    def _picture_digests(self) -> dict[str, str]:
        apart: dict[str, Sequence[Path]] = {}
        for task in self.vision_tasks:
            apart |= self.vision.picture_files(task)
        return {name: pictures_digest(files) for name, files in apart.items()}

    def _harness(self, task: str) -> TextHarness | VisionHarness | PictureHarness:
        if task in self.picture_tasks:
            return self.pictures
        return self.text if task in self.text_tasks else self.vision

    def plan(self) -> list[Request]:
        """All requests of all tasks."""
        return [one for task in self.tasks for one in self._harness(task).plan(task, self._copies[task])]

    def check_scoring(self) -> None:
        """Refuse to score without a file that some task needs, before anything takes time.

        Raises:
            ConfigError: naming the flag.
        """
        if self.picture_tasks:
            self.pictures.check_scoring(self.picture_tasks)

    def score(
        self, found: Mapping[str, Answered], graded: bool = False
    ) -> tuple[list[Measured], list[Request]]:
        """The values of all tasks from answers on disk, and the requests that they are to.

        Args:
            found: answer by key.
            graded: stock tasks, too, are to say which documents are wrong.

        Raises:
            MissingAnswers: with the count of each task that lacks some.
        """
        measured: list[Measured] = []
        requests: list[Request] = []
        missing: dict[str, int] = {}
        for task in self.tasks:
            try:
                values, asked = self._harness(task).score(task, self._copies[task], found, graded)
                measured += values
                requests += asked
            except MissingAnswers as error:
                missing |= error.counts
        if missing:
            raise MissingAnswers(missing)
        return measured, requests


def listing(data_root: Path) -> tuple[list[tuple[str, str, str]], dict[str, Sequence[str]]]:
    """The tasks of this project (name, protocol and who scores it, whether its dataset is there), and the groups."""
    harnesses = Harnesses((), data_root)
    vision = harnesses.vision
    rows: list[tuple[str, str, str]] = []
    groups: dict[str, Sequence[str]] = {}
    for name in sorted(vision.own_names()):
        if vision.is_group(name):
            groups[name] = vision.tasks(name)
        else:
            metadata = vision.metadata(name)
            what = f"{metadata.get('protocol', 'lmms-eval')}, scored {_WHERE[metadata.get('scored', 'here')]}"
            rows.append((name, what, _state(data_root, vision.needs(name))))
    for name, task in TEXT_TASKS.items():
        rows.append((name, f"{task.protocol}, scored here", _state(data_root, harnesses.text.needs(name))))
    for name, one in PICTURE_TASKS.items():
        where = _WHERE["judge" if one.judge else "here"]
        rows.append(
            (name, f"{one.protocol}, scored {where}", _state(data_root, harnesses.pictures.needs(name)))
        )
    return rows, groups | GROUPS


_WHERE = {"here": "here", "server": "by a server", "judge": "by a judge"}


def _state(root: Path, needs: Sequence[DatasetNeed]) -> str:
    try:
        for need in needs:
            check_dataset(root, need)
    except DataError as error:
        return "not found: " + str(error).partition(f"--data-root {root} ")[2].partition(":")[0]
    return f"found: {', '.join(sorted({need.path for need in needs}))}"


def versions() -> dict[str, str]:
    """Versions of what answers and scores depend on, by package."""
    return {name: version(name.replace("_", "-") if name != "megatron_eve" else name) for name in _PACKAGES}
