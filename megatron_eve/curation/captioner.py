"""Asks a model for captions of pictures, batch by batch: a folder that transformers loads, or a server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_eve.curation.caption_answers import CaptionAnswer, CaptionAnswers
from megatron_eve.curation.caption_prompts import drawn_prompt
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import Answer, Engine, Query
from megatron_eve.inference.http_client import ServerError
from megatron_eve.inference.http_engine import HTTPEngine, at_once
from megatron_eve.inference.sampling import Sampling

SERVER_ERROR = "server_error"
MOST_FAILED = 64
"""Rows in a row that a server may fail on before its error ends the shard, which the same command then continues."""


@dataclass(frozen=True)
class Picture:
    """A picture to be captioned.

    Attributes:
        row: of the shard.
        prompt: to ask with.
        data: the file's bytes; None where there is none.
        problem: why there is none; None of a row that is not to be asked for a caption.
    """

    row: int
    prompt: str
    data: bytes | None
    problem: SkipRow | None = None


class Captioner:
    """Captions pictures with an engine.

    Args:
        engine: the model.
        max_new_tokens: limit of a caption's tokens.
        sampling: how tokens are chosen.
    """

    def __init__(self, engine: Engine, max_new_tokens: int, sampling: Sampling) -> None:
        self._engine, self._max_new_tokens, self._sampling = engine, max_new_tokens, sampling

    def fill(self, answers: CaptionAnswers, pictures: Iterable[Picture], batch_size: int) -> None:
        """Caption pictures and append the answers, each batch before the next begins.

        Rows that the server fails on are held back until it answers another one: a server that is down ends the shard,
        and is not taken for so many rows without a caption.

        Args:
            answers: gets them.
            pictures: of `answers.missing`, in order.
            batch_size: pictures that are asked about together.

        Raises:
            ServerError: the server failed on more than `MOST_FAILED` rows in a row.
        """
        held: list[CaptionAnswer] = []
        following = iter(pictures)
        while batch := list(islice(following, batch_size)):
            held += self._batch(batch)
            failed = [answer for answer in held if answer.reason == SERVER_ERROR]
            if not failed or any(answer.caption is not None for answer in held):
                answers.append(held)
                held = []
            elif len(failed) > MOST_FAILED:
                raise ServerError(failed[-1].detail)
        if held:  # the last rows of the shard: is it their fault?
            assert isinstance(self._engine, HTTPEngine)
            self._engine.check_server()
            answers.append(held)

    def _batch(self, pictures: Sequence[Picture]) -> Iterator[CaptionAnswer]:
        prepared = [self._prepared(picture) for picture in pictures]
        asked = [one for one in prepared if isinstance(one, Query)]
        found = iter(self._answers(asked) if asked else [])
        for picture, one in zip(pictures, prepared, strict=True):
            if one is None:
                yield CaptionAnswer(picture.row)
            elif isinstance(one, SkipRow):
                yield CaptionAnswer(picture.row, reason=one.reason, detail=one.detail)
            elif (answer := next(found)).problem is not None:
                reason, _, detail = answer.problem.partition(": ")
                yield CaptionAnswer(picture.row, picture.prompt, reason=reason, detail=detail)
            else:
                yield CaptionAnswer(picture.row, picture.prompt, answer.text)

    def _prepared(self, picture: Picture) -> Query | SkipRow | None:
        if picture.data is None:
            return picture.problem
        try:
            text = self._engine.prompt([Turn("human", picture.prompt)], 1)
            return self._engine.prepare(text, [picture.data], self._max_new_tokens)
        except SkipRow as error:
            return error

    def _answers(self, queries: Sequence[Query]) -> list[Answer]:
        try:
            return self._engine.answers(queries, self._sampling)
        except ServerError:
            return at_once(self._alone, queries)  # which of them it fails on

    def _alone(self, query: Query) -> Answer:
        try:
            (answer,) = self._engine.answers([query], self._sampling)
        except ServerError as error:
            return Answer((), "", problem=f"{SERVER_ERROR}: {error}")
        return answer
