"""Conversations about a picture: limits, error messages for the user, and the request queue.

`RequestQueue` answers the questions of many threads one at a time, in the thread that owns the engine: a CUDA context
and the ranks of a layout take calls from one thread only.
"""

from __future__ import annotations

import errno
import queue
import socket
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_eve.config import ConfigError
from megatron_eve.data.errors import SkipRow
from megatron_eve.data.images.decode import ACCEPTED_FORMATS
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.engine import DrawingEngine, DrawingStep, Engine, EngineLost, Query
from megatron_eve.inference.sampling import GREEDY, GUIDANCE, Sampling, guidance_problem

_READABLE = {
    "image_empty": "The picture's file is empty.",
    "image_format": f"This is not a picture that can be read: {', '.join(ACCEPTED_FORMATS)} can.",
    "image_too_large": "The picture is too large: {detail}.",
    "image_damaged": "The picture is damaged, or cut off.",
    "no_tower": "This model cannot be shown pictures: {detail}.",
    "drawing_too_long": "This is too long to be drawn: {detail}.",
    "draws_nothing": "This model draws no pictures: {detail}.",
    "chat_template": "This model's chat template {detail}.",
    "typed_control_token": "This cannot be asked: {detail}.",
    "prompt_too_long": "This is too long for the model: {detail}. Begin a new conversation.",
}
HOST = "127.0.0.1"
"""Address of the page: this machine alone."""

_LOOK_SECONDS = 0.25  # seconds between checks whether to stop
_NO_PLACEHOLDER = "<image> stands for a picture, and cannot stand in a text that is drawn."
_PLACEHOLDER = (
    "<image> stands for a picture: write it once for each picture of the conversation, or not at all."
)


def check_port(port: int) -> None:
    """Refuse a `--port` that the page could not have; it is looked at before the model is loaded.

    Raises:
        ConfigError: naming the remedy.
    """
    if not 0 <= port < 1 << 16:
        raise ConfigError(
            f"--port {port}: must lie between 1 and {(1 << 16) - 1}, or be 0, which takes a free one"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            reason = (
                "is taken, perhaps by another page" if error.errno == errno.EADDRINUSE else error.strerror
            )
            raise ConfigError(
                f"--port {port}: {reason} ({HOST}); give another one, or 0, which takes a free one"
            ) from None


class Refused(Exception):
    """A question that is not answered; the message is shown to the user."""


@dataclass(frozen=True)
class Limits:
    """Limits for one user.

    Attributes:
        new_tokens: of one answer.
        questions: of one conversation.
        characters: of a conversation's questions and answers together; its tokens are limited separately.
        upload_bytes: of a picture's file. Its pixels are limited by the decoder.
        waiting: number of questions that may wait while one is answered.
        drawn: pictures that are drawn of a text at once.
    """

    new_tokens: int = 256
    questions: int = 16
    characters: int = 20_000
    upload_bytes: int = 20 << 20
    waiting: int = 8
    drawn: int = 4


@dataclass(frozen=True)
class Asked:
    """A question with the conversation before it.

    Attributes:
        question: its text.
        earlier: the questions before it, each with its answer.
        images: the picture files' bytes; they belong to the first question.
    """

    question: str
    earlier: tuple[tuple[str, str], ...] = ()
    images: tuple[bytes, ...] = ()

    def check(self, limits: Limits) -> None:
        """Raise Refused for what can be checked without the model.

        Raises:
            Refused: with the reason, in words for the user.
        """
        if not self.question.strip():
            raise Refused("Ask something.")
        if len(self.earlier) >= limits.questions:
            raise Refused(f"A conversation has at most {limits.questions} questions. Begin a new one.")
        texts = [self.question, *(text for turn in self.earlier for text in turn)]
        if sum(map(len, texts)) > limits.characters:
            raise Refused(
                f"A conversation has at most {limits.characters:,} characters. Begin a new one, or ask in fewer words."
            )
        if any(len(image) > limits.upload_bytes for image in self.images):
            raise Refused(f"A picture's file may have {limits.upload_bytes / (1 << 20):.0f} MiB.")
        _check_text("".join(texts))

    def query(self, engine: Engine, limits: Limits) -> Query:
        """The prompt, checked by the engine.

        Raises:
            Refused: as `check`, or for the picture, or for the length in tokens.
        """
        self.check(limits)
        try:
            turns = [turn for pair in self.earlier for turn in map(Turn, ("human", "gpt"), pair)]
            text = engine.prompt([*turns, Turn("human", self.question.strip())], len(self.images))
            return engine.prepare(text, self.images, limits.new_tokens)
        except SkipRow as error:
            raise Refused(_READABLE.get(error.reason, _PLACEHOLDER).format(detail=error.detail)) from error

    def pieces(self, engine: Engine, limits: Limits, sampling: Sampling) -> Generator[str, None, None]:
        """The answer's text, as it comes.

        Raises:
            Refused: as `query`.
        """
        yield from engine.stream(self.query(engine, limits), sampling)


@dataclass(frozen=True)
class AskedDrawing:
    """A text of which pictures are to be drawn.

    Attributes:
        text: what to draw.
        count: of the pictures.
        guidance: how far the text counts.
    """

    text: str
    count: int = 1
    guidance: float = GUIDANCE

    def check(self, limits: Limits) -> None:
        """Raise Refused for what can be checked without the model.

        Raises:
            Refused: with the reason, in words for the user.
        """
        if not self.text.strip():
            raise Refused("Say what to draw.")
        if len(self.text) > limits.characters:
            raise Refused(f"A text to draw has at most {limits.characters:,} characters.")
        if not 1 <= self.count <= limits.drawn:
            raise Refused(f"Between 1 and {limits.drawn} pictures are drawn at once.")
        if problem := guidance_problem(self.guidance):
            raise Refused(problem)
        _check_text(self.text)

    def pieces(
        self, engine: Engine, limits: Limits, sampling: Sampling
    ) -> Generator[DrawingStep, None, None]:
        """How far the drawing is; the last one has the pictures.

        Raises:
            Refused: as `check`, or for a model that draws none, or for the length in tokens.
        """
        self.check(limits)
        if not isinstance(engine, DrawingEngine):
            raise Refused("This model draws no pictures.")
        try:
            yield from engine.draw(self.text.strip(), self.count, self.guidance, sampling)
        except SkipRow as error:
            raise Refused(_READABLE.get(error.reason, _NO_PLACEHOLDER).format(detail=error.detail)) from error


def _check_text(text: str) -> None:
    """Raise Refused for a text that is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("The text holds half of a character.") from None


@dataclass
class Request:
    """A question or a drawing in the queue, and its answer as it comes.

    Attributes:
        asked: the question, or what is to be drawn.
        sampling: how tokens of the answer, or codes of the pictures, are chosen.
        events: ("piece", piece) and, at the end, ("done", "") or ("error", message).
        cancelled: set it when the answer is no longer needed.
    """

    asked: Asked | AskedDrawing
    sampling: Sampling = GREEDY
    events: queue.Queue[tuple[str, Any]] = field(default_factory=queue.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def pieces(self) -> Iterator[Any]:
        """What `asked.pieces` gives, as it comes.

        Raises:
            Refused: no answer, or an incomplete one, with the reason.
        """
        while (event := self.events.get())[0] == "piece":
            yield event[1]
        if event[0] == "error":
            raise Refused(event[1])


class RequestQueue:
    """A queue of questions from any thread, answered one at a time, first come, first served."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Request] = queue.Queue()
        self._closed = threading.Event()

    def submit(self, asked: Asked | AskedDrawing, sampling: Sampling = GREEDY) -> Request:
        """Add a question at the end of the queue."""
        request = Request(asked, sampling)
        self._waiting.put(request)
        return request

    def serve(self, engine: Engine, limits: Limits) -> None:
        """Answer until `close`, in this thread. A question that fails gets an error, and the next one is answered.

        Raises:
            EngineLost: the model's ranks are out of step, and nothing can be answered any more.
        """
        try:
            while not self._closed.is_set():
                try:
                    request = self._waiting.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    continue
                _answer(request, engine, limits)
        finally:
            while not self._waiting.empty():
                self._waiting.get().events.put(("error", "The server has ended."))

    def close(self) -> None:
        """Have `serve` return after the question that it is answering."""
        self._closed.set()


def _answer(request: Request, engine: Engine, limits: Limits) -> None:
    if request.cancelled.is_set():
        return
    try:
        pieces = request.asked.pieces(engine, limits, request.sampling)
        for piece in pieces:
            request.events.put(("piece", piece))
            if request.cancelled.is_set():
                break
        pieces.close()
        request.events.put(("done", ""))
    except Refused as error:
        request.events.put(("error", str(error)))
    except Exception as error:
        print(f"a question failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        request.events.put(("error", "The model failed on this question; the server's log says why."))
        if isinstance(error, EngineLost):
            raise
