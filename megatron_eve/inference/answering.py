"""A file of questions, answered batch by batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_eve.data.errors import SkipRow
from megatron_eve.inference.engine import Engine, Query
from megatron_eve.inference.questions import AnswerRow, AnswersFile, Question, read_picture
from megatron_eve.inference.sampling import GREEDY, Sampling


@dataclass
class AnswerCounts:
    """Counts of a run's questions and answers.

    Attributes:
        answered: by this run.
        skipped: number of questions by reason whose row holds an error instead of an answer.
        tokens: generated.
        seconds: from the first batch to the last.
    """

    answered: int
    skipped: dict[str, int]
    tokens: int
    seconds: float


def answer_questions(
    engine: Engine,
    answers: AnswersFile,
    image_folder: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    done: Callable[[int], object],
    sampling: Sampling = GREEDY,
) -> AnswerCounts:
    """Answer the questions that have no answer yet, in order.

    An invalid question, an unreadable picture or a prompt that is too long gives a row with an error, and the run goes
    on.

    Args:
        engine: whose `prepare` and `answers` are called.
        answers: knows which answers are missing; each batch is written to it before the next begins.
        image_folder: picture names are relative to it.
        batch_size: number of prompts that are answered together.
        max_new_tokens: of one answer.
        done: called after each batch with its number of questions.
        sampling: how a token is chosen.
    """
    tally, began = AnswerCounts(0, {}, 0, 0.0), time.monotonic()
    for questions in batches(answers.missing, batch_size):
        prepared: list[Query | SkipRow] = [
            _prepare(engine, question, image_folder, max_new_tokens) for question in questions
        ]
        queries = [query for query in prepared if isinstance(query, Query)]
        found = iter(engine.answers(queries, sampling) if queries else [])
        rows: list[AnswerRow] = []
        for question, one in zip(questions, prepared, strict=True):
            if isinstance(one, SkipRow):
                rows.append(AnswerRow(question, "", error=str(one)))
                tally.skipped[one.reason] = tally.skipped.get(one.reason, 0) + 1
            else:
                answer = next(found)
                digests = tuple(hashlib.sha256(image).hexdigest() for image in one.images)
                rows.append(AnswerRow(question, answer.text, digests))
                tally.answered += 1
                tally.tokens += len(answer.tokens)
        answers.append(rows)
        done(len(rows))
    tally.seconds = time.monotonic() - began
    return tally


def batches(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Batches of `size` questions, in order. Packs have no padding, so sorting by length would not help."""
    for start in range(0, len(questions), size):
        yield questions[start : start + size]


def _prepare(engine: Engine, question: Question, image_folder: Path, max_new_tokens: int) -> Query | SkipRow:
    try:
        if question.problem is not None:
            raise SkipRow("bad_question", question.problem)
        images = [read_picture(image_folder, name) for name in question.images]
        return engine.prepare(question.prompt, images, max_new_tokens)
    except SkipRow as error:
        return error
