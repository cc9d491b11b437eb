"""The requests of a shard, answered batch by batch by an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_eve.data.errors import SkipRow
from megatron_eve.evaluation.answers import Answered, ShardFile
from megatron_eve.evaluation.picture_answering import PictureAnswering, picture_digests
from megatron_eve.evaluation.requests import PICTURE_KINDS, Request
from megatron_eve.inference.engine import Answer, ContinuationQuery, Engine, LogLikelihood, Query


@dataclass
class AnsweringCounts:
    """Counts of a run.

    Attributes:
        answered: requests by this run.
        errors: requests without an answer, by task and reason.
        tokens: generated.
        seconds: from the first batch to the last.
    """

    answered: int = 0
    errors: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


def answer_requests(
    engine: Engine | None,
    requests: Sequence[Request],
    file: ShardFile,
    batch_size: int,
    done: Callable[[int], object],
    pictures: PictureAnswering | None = None,
) -> AnsweringCounts:
    """Answer requests in order, each batch on disk before the next begins.

    A picture that cannot be decoded or a prompt that is too long gives a row with an error, and the run goes on.

    Args:
        engine: the model; None where all requests are of `TOWER_KINDS`.
        requests: without an answer yet.
        file: gets the answers.
        batch_size: requests that are answered together; it changes no answer.
        done: called after each batch with its number of requests.
        pictures: answers the requests of `PICTURE_KINDS`.
    """
    counts, began = AnsweringCounts(), time.monotonic()
    for batch in _batches(requests, batch_size):
        if batch[0].kind in PICTURE_KINDS:
            assert pictures is not None
            answered = pictures.answers(batch, engine)
        else:
            assert engine is not None
            answered = _answers(engine, [_prepare(engine, request) for request in batch], counts)
        _count(batch, answered, counts)
        file.append(zip(batch, answered, strict=True))
        done(len(batch))
    counts.seconds = time.monotonic() - began
    return counts


def _batches(requests: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Batches of one kind of request, in order."""
    start = 0
    while start < len(requests):
        end = start + 1
        while end < min(start + size, len(requests)) and requests[end].kind == requests[start].kind:
            end += 1
        yield requests[start:end]
        start = end


def _prepare(engine: Engine, request: Request) -> Query | ContinuationQuery | SkipRow:
    try:
        text, images = request.context, tuple[bytes, ...]()
        if request.conversation is not None:
            conversation = request.conversation()
            text, images = engine.prompt(conversation.turns, len(conversation.images)), conversation.images
        if request.kind == "generate":
            return engine.prepare(text, images, request.max_new_tokens, request.stop)
        return engine.prepare_continuation(text, images, request.continuation)
    except SkipRow as error:
        return error


def _answers(
    engine: Engine,
    prepared: Sequence[Query | ContinuationQuery | SkipRow],
    counts: AnsweringCounts,
) -> list[Answered]:
    queries = [one for one in prepared if isinstance(one, Query)]
    continuations = [one for one in prepared if isinstance(one, ContinuationQuery)]
    generated = iter(engine.answers(queries) if queries else [])
    likelihoods = iter(engine.log_likelihoods(continuations) if continuations else [])
    answered: list[Answered] = []
    found: Answer | LogLikelihood | None
    problem: str | None
    for one in prepared:
        if isinstance(one, SkipRow):
            found, problem = None, str(one)
        else:
            found = next(generated) if isinstance(one, Query) else next(likelihoods)
            problem = found.problem
        if problem is not None:
            answered.append(Answered(error=problem))
            continue
        assert found is not None and not isinstance(one, SkipRow)
        digests = picture_digests(one.images)
        if isinstance(found, Answer):
            counts.tokens += len(found.tokens)
            answered.append(Answered(found.text, images=digests))
        else:
            answered.append(Answered(log_likelihood=found.sum, is_greedy=found.is_greedy, images=digests))
    return answered


def _count(batch: Sequence[Request], answered: Sequence[Answered], counts: AnsweringCounts) -> None:
    for request, answer in zip(batch, answered, strict=True):
        if answer.error is None:
            counts.answered += 1
            continue
        reason, reasons = answer.error.partition(":")[0], counts.errors.setdefault(request.task, {})
        reasons[reason] = reasons.get(reason, 0) + 1
