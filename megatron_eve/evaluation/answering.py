"""The requests of a shard, answered batch by batch by an engine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.prompts import prompt_text
from megatron_eve.data.text.turns import Turn
from megatron_eve.evaluation.answers import Answered, ShardFile
from megatron_eve.evaluation.requests import Conversation, Request
from megatron_eve.inference.engine import ContinuationQuery, Engine, Query


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
    engine: Engine,
    requests: Sequence[Request],
    file: ShardFile,
    batch_size: int,
    done: Callable[[int], object],
) -> AnsweringCounts:
    """Answer requests in order, each batch on disk before the next begins.

    A picture that cannot be decoded or a prompt that is too long gives a row with an error, and the run goes on.

    Args:
        engine: the model.
        requests: without an answer yet.
        file: gets the answers.
        batch_size: requests that are answered together; it changes no answer.
        done: called after each batch with its number of requests.
    """
    counts, began = AnsweringCounts(), time.monotonic()
    for batch in _batches(requests, batch_size):
        prepared = [_prepare(engine, request) for request in batch]
        answered = _answers(engine, batch, prepared, counts)
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
            text, images = conversation_prompt(conversation, engine.conv_mode), conversation.images
        if request.kind == "generate":
            return engine.prepare(text, images, request.max_new_tokens, request.stop)
        return engine.prepare_continuation(text, images, request.continuation)
    except SkipRow as error:
        return error


def _answers(
    engine: Engine,
    batch: Sequence[Request],
    prepared: Sequence[Query | ContinuationQuery | SkipRow],
    counts: AnsweringCounts,
) -> list[Answered]:
    queries = [one for one in prepared if isinstance(one, Query)]
    continuations = [one for one in prepared if isinstance(one, ContinuationQuery)]
    generated = iter(engine.answers(queries) if queries else [])
    likelihoods = iter(engine.log_likelihoods(continuations) if continuations else [])
    answered = []
    for request, one in zip(batch, prepared, strict=True):
        if isinstance(one, SkipRow):
            reasons = counts.errors.setdefault(request.task, {})
            reasons[one.reason] = reasons.get(one.reason, 0) + 1
            answered.append(Answered(error=str(one)))
            continue
        counts.answered += 1
        digests = tuple(hashlib.sha256(image).hexdigest() for image in one.images)
        if isinstance(one, Query):
            answer = next(generated)
            counts.tokens += len(answer.tokens)
            answered.append(Answered(answer.text, images=digests))
        else:
            likelihood = next(likelihoods)
            answered.append(
                Answered(log_likelihood=likelihood.sum, is_greedy=likelihood.is_greedy, images=digests)
            )
    return answered


def conversation_prompt(conversation: Conversation, conv_mode: str) -> str:
    """The text that a model continues, by the template of its conversations.

    Raises:
        ConversationError: another number of `<image>` than of pictures, or turns that do not alternate.
    """
    system = "\n".join(turn.text for turn in conversation.turns if turn.role == "system") or None
    turns = [turn for turn in conversation.turns if turn.role != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=False)
    earlier = [(_text(asked, "human"), _text(answer, "gpt")) for asked, answer in pairs]
    if len(turns) % 2 == 0:
        raise SkipRow("no_question", "the conversation ends with an answer")
    return prompt_text(_text(turns[-1], "human"), conv_mode, len(conversation.images), earlier, system)


def _text(turn: Turn, role: str) -> str:
    if turn.role != role:
        raise SkipRow("roles", f"a turn of {turn.role!r} where one of {role!r} belongs")
    return turn.text
