"""Tasks of text: lm-eval builds their requests and scores answers, as `vision_harness` has lmms-eval do it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megatron_eve.config.errors import ConfigError
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
from megatron_eve.evaluation.measured import Measured, stock_values, with_grades
from megatron_eve.evaluation.requests import Conversation, Request
from megatron_eve.evaluation.text_tasks import TEXT_TASKS, TextTask

# lm-eval's own models generate so much where a task gives no limit.
_MAX_NEW_TOKENS = 256


@cache
def _task_files() -> TaskManager:
    """lm-eval's task files; reading them takes seconds."""
    return TaskManager()


class TextHarness:
    """lm-eval over a data root.

    Args:
        data_root: whose folders the tasks read.
    """

    def __init__(self, data_root: Path) -> None:
        logging.getLogger("lm_eval").setLevel(logging.CRITICAL)  # what goes wrong is said by the errors
        self._root, self._manager = data_root, _task_files()

    def needs(self, name: str) -> list[DatasetNeed]:
        """The datasets that a task reads, one for each of its parts."""
        return [self._need(name, leaf) for leaf in self._leaves(TEXT_TASKS[name].name)]

    def _need(self, name: str, leaf: str) -> DatasetNeed:
        config = self._manager.task_index[leaf].cfg
        split = config.get("test_split") or config["validation_split"]
        return DatasetNeed(name, config["dataset_path"], config.get("dataset_name"), split)

    def _leaves(self, name: str) -> list[str]:
        entry = self._manager.task_index[name]
        below = entry.cfg.get("task") if entry.cfg else None
        if isinstance(below, list):
            return [leaf for one in below for leaf in self._leaves(one)]
        if entry.kind.name == "TAG":
            return [leaf for leaf, one in self._manager.task_index.items() if name in one.tags]
        return [name]

    def plan(self, name: str, copies: Path) -> list[Request]:
        """All requests of a task, in the harness's order.

        Args:
            name: of the task.
            copies: folder of its dataset's copy in Arrow.

        Raises:
            UserError: data that it cannot read.
        """
        model = _Recorder(name)
        with quiet_run("lm-eval", name, self._root, copies), contextlib.suppress(RequestsComplete):
            self._run(model, TEXT_TASKS[name])
        return model.requests

    def score(
        self, name: str, copies: Path, found: Mapping[str, Answered], graded: bool = False
    ) -> tuple[list[Measured], list[Request]]:
        """The values of a task from answers on disk, and the requests that they are to.

        Args:
            name: of the task.
            copies: folder of its dataset's copy in Arrow.
            found: answer by key.
            graded: it is to say which documents are wrong.

        Raises:
            MissingAnswers: some requests have no answer.
            UserError: as `plan`.
        """
        task = TEXT_TASKS[name]
        with quiet_run("lm-eval", name, self._root, copies):
            model = _Replay(name, found)
            results = self._run(model, task, graded)
        leaves = self._leaves(task.name)
        n = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
        values = stock_values(name, results["results"][task.name], n, task.protocol, task.main)
        if graded:
            lower = lower_is_better(results, task.name)
            values = with_grades(values, results["samples"], model.requests, lower)
        return list(values), model.requests

    def _run(self, model: LM, task: TextTask, log_samples: bool = False) -> Any:
        return lm_eval.evaluator.simple_evaluate(
            model=model,
            tasks=[task.name],
            task_manager=self._manager,
            num_fewshot=task.shots,
            apply_chat_template=task.chat,
            fewshot_as_multiturn=task.chat,
            log_samples=log_samples,
        )


class _Recorder(LM):
    """A model of lm-eval's that keeps the requests, and ends the run there."""

    tokenizer_name = ""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._task = name, TEXT_TASKS[name]
        self.requests: list[Request] = []

    def loglikelihood(self, requests: Any) -> Any:
        """Called with all requests of this kind."""
        self.requests = [self._request(one, "log_likelihood", continuation=one.args[1]) for one in requests]
        return self._answers()

    def generate_until(self, requests: Any) -> Any:
        """Called with all requests of this kind."""
        self.requests = [self._request(one, "generate", **self._settings(one.args[1])) for one in requests]
        return self._answers()

    def loglikelihood_rolling(self, requests: Any) -> Any:
        """Called for perplexities."""
        raise ConfigError(f"--tasks {self._name}: asks for the perplexity of texts, which is not done here")

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        """The conversation as JSON: the template is the engine's."""
        return json.dumps(chat_history)

    def _answers(self) -> Any:
        raise RequestsComplete

    def _settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "max_new_tokens": int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)),
            "stop": stop_texts(settings),
        }

    def _request(self, one: Any, kind: Any, **more: Any) -> Request:
        context = one.args[0]
        return Request(
            task=self._name,
            split=one.task_name,
            doc_id=one.doc_id,
            number=one.idx,
            kind=kind,
            context=context,
            conversation=(lambda: _conversation(context)) if self._task.chat else None,
            shots=self._task.shots or 0,
            **more,
        )


def _conversation(context: str) -> Conversation:
    return Conversation(tuple(Turn(ROLES[one["role"]], one["content"]) for one in json.loads(context)))


class _Replay(_Recorder):
    """Gives the answers on disk, and refuses while some are missing."""

    def __init__(self, name: str, found: Mapping[str, Answered]) -> None:
        super().__init__(name)
        self._found = found

    def _answers(self) -> Any:
        if missing := missing_by_task(self.requests, self._found):
            raise MissingAnswers(missing)
        return [_given(request, self._found[request.key]) for request in self.requests]


def _given(request: Request, answer: Answered) -> Any:
    """An answer as lm-eval takes it; one that does not exist is the least likely, or an empty text."""
    if request.kind == "generate":
        return answer.text
    return (-float("inf") if answer.log_likelihood is None else answer.log_likelihood, answer.is_greedy)
