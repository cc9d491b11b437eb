"""Tasks whose answers are pictures, or classes of pictures: their requests, and their scores.

Behind the interface of `vision_harness` and `text_harness`: needs, plan, score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import DataError
from megatron_eve.data.images import DEFAULT_MAX_PIXELS, ImageError, decode_image
from megatron_eve.data.images.resizing import Pixels
from megatron_eve.evaluation.answers import Answered, MissingAnswers, missing_by_task
from megatron_eve.evaluation.data_root import DatasetNeed, check_dataset
from megatron_eve.evaluation.inception import FLAG, Inception
from megatron_eve.evaluation.measured import Measured
from megatron_eve.evaluation.picture_answering import given_picture, middle_square
from megatron_eve.evaluation.picture_data import (
    JUDGED_PROMPTS,
    PICTURES,
    PROMPTS,
    PictureRows,
    class_names,
    read_judged_prompts,
    read_prompts,
)
from megatron_eve.evaluation.picture_tasks import PICTURE_TASKS, PictureTask
from megatron_eve.evaluation.requests import Conversation, Request
from megatron_eve.evaluation.scorers.classes import ClassRow, score_classes
from megatron_eve.evaluation.scorers.frechet import FeatureSums, frechet_distance
from megatron_eve.evaluation.scorers.judged import JudgeRow
from megatron_eve.evaluation.scorers.scores import Reported, bad_label, in_percent
from megatron_eve.runtime.digests import file_digest

_LEFT_OUT = "left out"
"""What happens to a request without an answer where a distance is measured."""


class PictureHarness:
    """`PICTURE_TASKS` over a data root.

    Args:
        data_root: whose folders the tasks read.
        answers: folder of the answers, where scores are asked for.
        inception: file of the Inception network, for a Frechet distance.
    """

    def __init__(self, data_root: Path, answers: Path | None = None, inception: Path | None = None) -> None:
        self._root, self._answers, self._inception = data_root, answers, inception
        self._network: Inception | None = None

    def needs(self, name: str) -> list[DatasetNeed]:
        """The dataset that a task reads."""
        task = PICTURE_TASKS[name]
        if task.judge:
            return [DatasetNeed(name, task.dataset_path, None, "", files=(JUDGED_PROMPTS,))]
        if task.split is None:
            return [DatasetNeed(name, task.dataset_path, None, "", files=(PROMPTS, PICTURES))]
        return [DatasetNeed(name, task.dataset_path, None, task.split, ("image", "label"))]

    def check_scoring(self, names: Iterable[str]) -> None:
        """Refuse to score without the file that a Frechet distance needs, before anything takes time.

        Raises:
            ConfigError: it is not named, not there, or another file.
        """
        wanted = [name for name in names if PICTURE_TASKS[name].is_frechet]
        if wanted and self._inception is None:
            raise ConfigError(
                f"--tasks {wanted[0]}: its score needs {FLAG} FILE, the Inception network of the FID as TorchScript "
                "(inception-2015-12-05.pt, see docs/evaluation.md)"
            )
        if wanted and self._inception is not None and self._network is None:
            self._network = Inception(self._inception)

    def plan(self, name: str, copies: Path) -> list[Request]:
        """All requests of a task, in the order of its dataset.

        Args:
            name: of the task.
            copies: not used: nothing is converted.

        Raises:
            DataError: data that it cannot read.
        """
        task = PICTURE_TASKS[name]
        if task.split is None:
            given = (self._folder(task), self._where(task))
            file, prompts = (
                (JUDGED_PROMPTS, [row.prompt for row in read_judged_prompts(*given)])
                if task.judge
                else (PROMPTS, [row.prompt for row in read_prompts(*given)])
            )
            return [
                Request(name, file, number, 0, "draw", prompt, guidance=task.guidance, sampling=task.sampling)
                for number, prompt in enumerate(prompts)
            ]
        rows, context = self._rows(task), ""
        classes: tuple[tuple[str, ...], ...] = ()
        if task.kind == "classify":
            classes = self._classes(task)
            digest = hashlib.sha256(json.dumps(classes).encode()).hexdigest()
            context = f"one of {len(classes):,} classes, texts {digest[:16]}"
        return [
            Request(
                name, task.split, number, 0, task.kind, context, partial(_conversation, rows, number),
                classes=classes,
            )
            for number in range(len(rows))
        ]  # fmt: skip

    def score(
        self, name: str, copies: Path, found: Mapping[str, Answered], graded: bool = False
    ) -> tuple[list[Measured], list[Request]]:
        """The values of a task from answers on disk, and the requests that they are to; arguments as of `plan`.

        `graded` is not used: tasks of this project always say which answers are wrong.

        Raises:
            MissingAnswers: some requests have no answer.
            UserError: as `plan` and `check_scoring`, a label that is no class, or a picture that is missing.
        """
        task, requests = PICTURE_TASKS[name], self.plan(name, copies)
        if missing := missing_by_task(requests, found):
            raise MissingAnswers(missing)
        if task.kind == "classify":
            return list(self._class_values(task, requests, found)), requests
        if task.judge:
            return [self._for_judge(task, requests, found)], requests
        self.check_scoring([name])
        answered = [request for request in requests if found[request.key].error is None]
        made, references = FeatureSums(), FeatureSums()
        if task.kind == "draw":
            self._add(task, made, (self._picture(one, found) for one in answered), len(answered))
            prompts = read_prompts(self._folder(task), self._where(task))
            pictures = (_reference(row.picture, self._where(task)) for row in prompts)
            self._add(task, references, pictures, len(prompts))
        else:
            self._add_pairs(task, made, references, answered, found)
        return [self._distance(task, made, references)], requests

    def _for_judge(
        self, task: PictureTask, requests: Sequence[Request], found: Mapping[str, Answered]
    ) -> Measured:
        """No value, and the pictures for a judge."""
        assert self._answers is not None
        rows = []
        prompts = read_judged_prompts(self._folder(task), self._where(task))
        for request, row in zip(requests, prompts, strict=True):
            answer = found[request.key]
            text = answer.text if answer.error is None else None
            picture = self._answers / answer.text if text is not None else None
            rows.append(JudgeRow(row.id, row.prompt, "", text, row.skills, picture))
        return Measured(
            task.task, task.metric, None, None, len(rows), task.protocol, True,
            ("a judge alone scores these pictures: --judge-url",), task.published, judged=rows,
            judge_rule=task.judge,
        )  # fmt: skip

    def _add_pairs(
        self,
        task: PictureTask,
        made: FeatureSums,
        references: FeatureSums,
        answered: Sequence[Request],
        found: Mapping[str, Answered],
    ) -> None:
        """Reconstructions, and the squares that they are of at their size."""

        def squares() -> Iterator[Pixels]:
            for request in answered:
                size = len(self._picture(request, found))
                yield middle_square(_decoded(given_picture(request)), size)

        self._add(task, made, (self._picture(one, found) for one in answered), len(answered))
        self._add(task, references, squares(), len(answered))

    def _add(self, task: PictureTask, sums: FeatureSums, pictures: Iterable[Pixels], count: int) -> None:
        assert self._network is not None
        with tqdm(total=count, desc=task.task) as bar:
            for features in self._network.features(pictures):
                sums.add(features)
                bar.update(len(features))

    def _distance(self, task: PictureTask, made: FeatureSums, references: FeatureSums) -> Measured:
        assert self._inception is not None
        if min(made.n, references.n) < 2:
            raise DataError(
                f"--tasks {task.task}: {made.n} pictures of the model and {references.n} of the dataset; a Frechet "
                "distance needs two of each"
            )
        features, fewest = len(made.mean), min(made.n, references.n)
        notes = [f"Inception network {self._inception.name}, sha256 {file_digest(self._inception)}"]
        if made.n != references.n:
            notes.append(f"{made.n:,} pictures of the model against {references.n:,}")
        if fewest <= features:
            notes.append(
                f"{fewest:,} pictures are too few for {features:,} features: compare it with nothing"
            )
        return Measured(
            task.task, task.metric, frechet_distance(made, references), None, made.n, task.protocol, True,
            tuple(notes), task.published, without_answer=_LEFT_OUT,
        )  # fmt: skip

    def _class_values(
        self, task: PictureTask, requests: Sequence[Request], found: Mapping[str, Answered]
    ) -> Iterator[Measured]:
        names = [one[0] for one in class_names(self._folder(task), self._where(task))]
        rows = []
        for request, label in zip(requests, self._rows(task).labels(), strict=True):
            if type(label) is not int or not 0 <= label < len(names):
                remedy = f"classes are 0 to {len(names) - 1}"
                raise bad_label(task.task, f"{request.split} {request.doc_id}", label, remedy)
            answer = found[request.key]
            best = [int(word) for word in answer.text.split()] if answer.error is None else None
            rows.append(ClassRow(request.doc_id, best, label, names[label]))
        first, best_five = score_classes(task.task, rows)
        reported = [("top-1", in_percent(first, rows)), ("top-5", in_percent(best_five))]
        yield from (_measured(task, metric, one) for metric, one in reported)

    def _picture(self, request: Request, found: Mapping[str, Answered]) -> Pixels:
        """The picture of an answer, uint8 [P, P, 3]."""
        assert self._answers is not None
        path = self._answers / found[request.key].text
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"--answers {self._answers}: the picture {path.name} of {request.task} cannot be read "
                f"({' '.join(str(error).split())[:100]}); remove the line with its key, and run tools/evaluate.py "
                "answer again"
            ) from None

    def _rows(self, task: PictureTask) -> PictureRows:
        (need,) = self.needs(task.task)
        return PictureRows(check_dataset(self._root, need), self._where(task))

    def _classes(self, task: PictureTask) -> tuple[tuple[str, ...], ...]:
        """The texts of each class: all templates with all of its names."""
        return tuple(
            tuple(template.replace("{}", name) for name in names for template in task.templates)
            for names in class_names(self._folder(task), self._where(task))
        )

    def _folder(self, task: PictureTask) -> Path:
        return self._root / task.dataset_path

    def _where(self, task: PictureTask) -> str:
        return f"--tasks {task.task}: --data-root {self._root}"


def _conversation(rows: PictureRows, number: int) -> Conversation:
    """One picture, and nothing asked."""
    return Conversation((), (rows.image(number),))


def _decoded(image: bytes) -> Image.Image:
    return decode_image(image, apply_exif=True, max_pixels=DEFAULT_MAX_PIXELS)


def _reference(path: Path, where: str) -> Pixels:
    """A reference picture, whole."""
    try:
        return np.asarray(_decoded(path.read_bytes()))
    except (OSError, ImageError) as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); copy it again") from None


def _measured(task: PictureTask, metric: str, reported: Reported) -> Measured:
    main = metric == task.metric
    labels = [{"class": row.name, "best": row.answer} for row in reported.rows]
    return Measured(
        task.task, metric, reported.value, reported.standard_error, reported.n, task.protocol, main,
        tuple(f"{note.count:,} {note.what}: {note.why}" for note in reported.left_out),
        task.published if main else {},
        list(zip(reported.points, labels, strict=True)) if main else (),
    )  # fmt: skip
