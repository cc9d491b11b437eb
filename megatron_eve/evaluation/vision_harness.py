"""Tasks with pictures: lmms-eval builds their requests and scores answers; the answering stands between the two.

lmms-eval takes RANK and WORLD_SIZE for its own and calls collectives on the default group, where the other ranks of a
model would never arrive. So it never sees an engine: the first time it runs with a model that keeps its requests and
ends the run there, the second time, in another process, with one that gives the answers on disk.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval.evaluator
import tenacity
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager
from loguru import logger
from PIL import Image, ImageFile

from megatron_eve.config.errors import ConfigError
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.turns import Turn
from megatron_eve.evaluation.answers import Answered, MissingAnswers, missing_by_task
from megatron_eve.evaluation.data_root import DatasetNeed
from megatron_eve.evaluation.harness_run import (
    ROLES,
    RequestsComplete,
    lower_is_better,
    quiet_run,
    stop_texts,
)
from megatron_eve.evaluation.measured import Measured, own_values, stock_values, with_grades
from megatron_eve.evaluation.requests import Conversation, Request
from megatron_eve.evaluation.scorers.scores import NoAnswer
from megatron_eve.models.text_format import IMAGE_TOKEN

TASKS = Path(__file__).parent / "tasks"
"""Task files of our own."""
# lmms-eval has Pillow fill what a damaged file lacks with grey, for the whole process.
ImageFile.LOAD_TRUNCATED_IMAGES = False


@cache
def _task_files() -> TaskManager:
    """lmms-eval's task files and ours; reading them takes seconds."""
    return TaskManager("ERROR", include_path=[str(TASKS)] if TASKS.is_dir() else None)


class VisionHarness:
    """lmms-eval over a data root.

    Args:
        data_root: whose folders the tasks read.
    """

    def __init__(self, data_root: Path) -> None:
        logger.remove()  # its messages; what goes wrong is said by the errors
        for method in (ConfigurableTask.download, ConfigurableTask.process_results):
            # It tries five times, with pauses, what would help with a network.
            method.retry.stop, method.retry.reraise = tenacity.stop_after_attempt(1), True
        self._root, self._manager = data_root, _task_files()

    @property
    def names(self) -> list[str]:
        """All tasks, groups and tags."""
        return list(self._manager.all_tasks)

    def own_names(self) -> list[str]:
        """Tasks and groups of this project."""
        index = self._manager.task_index
        return [name for name in index if str(index[name]["yaml_path"]).startswith(str(TASKS))]

    def is_group(self, name: str) -> bool:
        """True for a group or tag."""
        return self._manager.task_index[name]["type"] in ("group", "tag")

    def tasks(self, name: str) -> list[str]:
        """The tasks that a name stands for: itself, or those of a group or tag, in order."""
        entry = self._manager.task_index[name]
        if entry["type"] in ("task", "python_task"):
            return [name]
        below = entry["task"] if entry["task"] != -1 else self._manager._get_config(name)["task"]
        names = [one if isinstance(one, str) else one["task"] for one in below]
        return [task for one in names for task in self.tasks(one)]

    def needs(self, task: str) -> list[DatasetNeed]:
        """The datasets that a task reads.

        Raises:
            ConfigError: a task that reads no dataset of the hub's layout.
        """
        config = self._manager._get_config(task)
        path, split = config.get("dataset_path"), config.get("test_split") or config.get("validation_split")
        if not isinstance(path, str) or not isinstance(split, str):
            raise ConfigError(
                f"--tasks {task}: its task file names no dataset_path and split, which is not supported"
            )
        metadata = self.metadata(task)
        first = DatasetNeed(task, path, config.get("dataset_name"), split, tuple(metadata.get("columns", ())))
        more = metadata.get("more_configs", ())
        return [first, *(DatasetNeed(task, path, name, split) for name in more)]

    def picture_files(self, task: str) -> dict[str, list[Path]]:
        """Pictures of a task that are not in its dataset, by a name for them."""
        find = self.metadata(task).get("picture_files")
        return find(self._root) if find else {}

    def metadata(self, task: str) -> dict[str, Any]:
        """What a task file says of itself under `metadata`."""
        found = self._manager._get_config(task).get("metadata") or {}
        if isinstance(found, list):  # as many stock files have it
            found = {name: value for one in found if isinstance(one, dict) for name, value in one.items()}
        return dict(found)

    def plan(self, task: str, copies: Path) -> list[Request]:
        """All requests of a task, in the harness's order.

        Args:
            task: its name.
            copies: folder of its dataset's copy in Arrow.

        Raises:
            UserError: a task that cannot be asked here, or data that it cannot read.
        """
        model = _Recorder()
        with quiet_run("lmms-eval", task, self._root, copies), contextlib.suppress(RequestsComplete):
            self._run(model, task)
        return model.requests

    def score(
        self, task: str, copies: Path, found: Mapping[str, Answered], graded: bool = False
    ) -> tuple[list[Measured], list[Request]]:
        """The values of a task from answers on disk, and the requests that they are to.

        Args:
            task: its name.
            copies: folder of its dataset's copy in Arrow.
            found: answer by key.
            graded: a stock task, too, is to say which documents are wrong.

        Raises:
            MissingAnswers: some requests have no answer.
            UserError: as `plan`, or a label that a scorer cannot take.
        """
        model = _Replay(found)
        with quiet_run("lmms-eval", task, self._root, copies):
            results = self._run(model, task, graded and task not in self.own_names())
        values = self._values(task, results)
        if samples := results.get("samples"):
            asked = {request.split: samples[task] for request in model.requests}
            values = with_grades(values, asked, model.requests, lower_is_better(results, task))
        return list(values), model.requests

    def _values(self, task: str, results: Mapping[str, Any]) -> Iterable[Measured]:
        metadata, n = self.metadata(task), results["n-samples"][task]["effective"]
        main, protocol = metadata.get("main_metric"), metadata.get("protocol", "lmms-eval")
        values = results["results"][task]
        own = own_values(task, values, protocol, main, metadata.get("published"), metadata.get("judge", ""))
        return [*own] or stock_values(task, values, n, protocol, main)

    def _run(self, model: lmms, task: str, log_samples: bool = False) -> Any:
        lmms_eval.api.task._resolve_hf_datasets_cache_dir.cache_clear()  # of the task before
        return lmms_eval.evaluator.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=self._manager,
            batch_size=1,
            log_samples=log_samples,
            # Documents come without their pictures: one that cannot be decoded costs no score.
            cli_args=argparse.Namespace(process_with_media=False, reasoning_tags=None, output_path=None),
            process_docs_parallel=1,
        )


class _Recorder(lmms):
    """A model of lmms-eval's that keeps the requests, and ends the run when all of them are there."""

    is_simple = False  # asked with messages

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []

    def generate_until(self, requests: Any) -> list[str]:
        """Called by lmms-eval with all requests of this kind."""
        self.requests += [self._request(one) for one in requests]
        return [""] * len(requests)

    def loglikelihood(self, requests: Any) -> Any:
        """Called for tasks that compare likelihoods."""
        raise ConfigError(
            f"--tasks {requests[0].task_name}: asks for likelihoods of texts about pictures, which is not done here"
        )

    def generate_until_multi_round(self, requests: Any) -> Any:
        """Called for tasks that ask again."""
        raise ConfigError(f"--tasks {requests[0].task_name}: asks in several rounds, which is not done here")

    generate_until_agentic = generate_until_multi_round

    def clean(self) -> None:
        """Called when all requests have been made."""
        raise RequestsComplete

    def _request(self, one: Any) -> Request:
        context, doc_to_messages, settings, doc_id, task, split = one.args
        _check_greedy(task, settings)
        return Request(
            task=task,
            split=split,
            doc_id=doc_id,
            number=one.idx,
            kind="generate",
            context=context if isinstance(context, str) else repr(context),
            conversation=_opener(self.task_dict, task, split, doc_id, doc_to_messages),
            max_new_tokens=int(settings.get("max_new_tokens", 1024)),
            stop=stop_texts(settings),
        )


class _Replay(_Recorder):
    """Gives the answers on disk."""

    def __init__(self, found: Mapping[str, Answered]) -> None:
        super().__init__()
        self._found = found

    def generate_until(self, requests: Any) -> list[str]:
        """Called by lmms-eval with all requests of this kind."""
        super().generate_until(requests)
        answers = [self._found.get(request.key) for request in self.requests[-len(requests) :]]
        return [NoAnswer() if one is None or one.error is not None else one.text for one in answers]

    def clean(self) -> None:
        """Called when all requests have been made: refuses to go on while answers are missing."""
        if missing := missing_by_task(self.requests, self._found):
            raise MissingAnswers(missing)


def _check_greedy(task: str, settings: Mapping[str, Any]) -> None:
    if (settings.get("do_sample") and settings.get("temperature", 1.0)) or int(
        settings.get("num_beams") or 1
    ) > 1:
        raise ConfigError(
            f"--tasks {task}: its task file samples or searches with beams, and answers here are greedy"
        )


def _opener(
    datasets: Mapping[str, Any], task: str, split: str, doc_id: int, doc_to_messages: Callable[[Any], Any]
) -> Callable[[], Conversation]:
    def open_it() -> Conversation:
        try:
            messages = doc_to_messages(datasets[task][split][doc_id])
        except SkipRow:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise SkipRow("image_unreadable", " ".join(str(error).split())[:200]) from error
        return conversation_of(messages)

    return open_it


def conversation_of(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Turns and pictures of messages in the layout of chat models.

    Where all pictures stand in front of the first text, as stock tasks have them, the texts get no `<image>`.

    Raises:
        SkipRow: a video or sound.
    """
    turns: list[Turn] = []
    images: list[bytes] = []
    interleaved = said = False
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
                said = True
            elif part["type"] == "image":
                interleaved = interleaved or said
                images.append(picture_file(part["url"]))
                text += f"{IMAGE_TOKEN}\n"
            else:
                raise SkipRow("not_a_picture", f"the task shows a {part['type']}")
        turns.append(Turn(ROLES[message["role"]], text))
    if not interleaved and images:
        turns[0] = Turn(turns[0].role, turns[0].text.removeprefix(f"{IMAGE_TOKEN}\n" * len(images)))
    return Conversation(tuple(turns), tuple(images))


def picture_file(picture: Any) -> bytes:
    """A picture as a file: PPM, which is written in a fraction of PNG's time, and holds the same pixels."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str):
        return Path(picture).read_bytes()
    rgb = picture.convert("RGB")
    return b"P6\n%d %d\n255\n" % rgb.size + rgb.tobytes()
