"""Asks a model for captions of pictures, batch by batch: a folder that transformers loads, or a server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_eve.curation.caption_answers import CaptionAnswer, CaptionAnswers
from megatron_eve.data.errors import DataError, SkipRow
from megatron_eve.data.schema import Record
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import OWN_TEMPLATE, Answer, Engine, PromptError, Query
from megatron_eve.inference.http_client import ServerError
from megatron_eve.inference.http_engine import HTTPEngine, at_once
from megatron_eve.inference.sampling import Sampling

SERVER_ERROR = "server_error"
_TOO_LONG = "prompt_too_long"
MOST_FAILED = 64
"""Rows in a row that a server may fail on before its error ends the shard, which the same command then continues."""


@dataclass(frozen=True)
class CaptionModel:
    """Which model answers.

    Attributes:
        folder: that transformers loads; None for a server.
        conv_mode: the template of its prompts, or OWN_TEMPLATE.
        base_url: address of the server; None for a folder.
        served: the name that the server gives the model.
        sha256: of the folder's files; of a server, of what it says of the model.
    """

    folder: Path | None
    conv_mode: str
    base_url: str | None
    served: str | None
    sha256: str


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


def picture_of(row: int, prompt: str, record: Record | SkipRow) -> Picture:
    """The picture of a row; none of a row that is no pair of one picture and a caption, and that keeps its text."""
    if isinstance(record, SkipRow):
        return Picture(row, prompt, None, record)
    if record.kind != "pair" or len(record.images) != 1:
        return Picture(row, prompt, None)
    data = record.images[0].data
    if data is None:
        name = record.images[0].path
        return Picture(row, prompt, None, SkipRow("picture_not_in_shard", f"{name} has no bytes"))
    return Picture(row, prompt, data)


def open_engine(model: CaptionModel) -> Engine:
    """The engine of a model.

    Raises:
        ConfigError: the folder cannot be opened.
        ServerError: the server cannot be reached, or serves no such model.
    """
    if model.base_url is not None and model.served is not None:
        return HTTPEngine(model.base_url, model.served)
    assert model.folder is not None
    if model.conv_mode == OWN_TEMPLATE:
        from megatron_eve.inference.transformers_engine import TransformersEngine

        return TransformersEngine(model.folder)
    from megatron_eve.inference.hf_engine import HFEngine

    return HFEngine(model.folder, model.conv_mode)


class Captioner:
    """Captions pictures with an engine.

    Args:
        engine: the model.
        max_new_tokens: limit of a caption's tokens.
        sampling: how tokens are chosen.
    """

    def __init__(self, engine: Engine, max_new_tokens: int, sampling: Sampling) -> None:
        self._engine, self._max_new_tokens, self._sampling = engine, max_new_tokens, sampling

    def fill(
        self,
        answers: CaptionAnswers,
        pictures: Iterable[Picture],
        batch_size: int,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        """Caption pictures and append the answers, each batch before the next begins.

        Rows that the server fails on are held back until it answers another one: a server that is down ends the shard,
        and is not taken for so many rows without a caption.

        Args:
            answers: gets them.
            pictures: of `answers.missing`, in order.
            batch_size: pictures that are asked about together.
            done: called after each batch.

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
            done()
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
        except PromptError as error:
            if error.reason == _TOO_LONG:
                return error
            # Every row would have it.
            raise DataError(
                f"the model takes no prompt with one picture ({error.reason}: {error.detail}): change the prompts or "
                "--conv-mode, or name another model"
            ) from error
        except SkipRow as error:
            return error

    def _answers(self, queries: Sequence[Query]) -> list[Answer]:
        if isinstance(
            self._engine, HTTPEngine
        ):  # a picture that the server fails on costs no other its answer
            return at_once(self._alone, queries)
        try:
            return self._engine.answers(queries, self._sampling)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; a server is asked without torch
                raise
            raise DataError(
                f"the memory of the GPU is too small for --batch-size {len(queries)}: give a smaller one"
            ) from error

    def _alone(self, query: Query) -> Answer:
        try:
            (answer,) = self._engine.answers([query], self._sampling)
        except ServerError as error:
            return Answer((), "", problem=f"{SERVER_ERROR}: {error}")
        return answer
