"""The interface of models that answer questions: prompts in, text out, at once or streamed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.sampling import GREEDY, Sampling

REPLACEMENT = "\ufffd"
NO_TOWER = (
    "it reads and draws pictures as codes, and the tower of these is not known: name its folder with --tower"
)


class PromptError(SkipRow):
    """A prompt that the model cannot take; `reason` is, for example, "prompt_too_long"."""


class EngineLost(RuntimeError):
    """The ranks of the model are out of step: nothing can be answered any more."""


@dataclass(frozen=True)
class Query:
    """A prompt that an engine has checked.

    Attributes:
        text: as `data.text.prompts.prompt_text` makes it, with an `<image>` for each picture.
        images: the image files' bytes, in order; each has been decoded once.
        length: tokens of the prompt, images expanded.
        max_new_tokens: limit of its answer's tokens.
        stop: texts that end an answer, which ends before the first one found.
    """

    text: str
    images: tuple[bytes, ...]
    length: int
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContinuationQuery:
    """A prompt and a text behind it whose probability is asked for."""

    text: str
    images: tuple[bytes, ...]
    continuation: str
    length: int


@dataclass(frozen=True)
class LogLikelihood:
    """Of a continuation's tokens."""

    sum: float
    is_greedy: bool
    problem: str | None = None


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        tokens: new token ids, without the one that ended the answer.
        text: their text, without white space around it.
        problem: why there is none, with the reason's name in front; None where there is one. Only a server finds out
            while it answers.
    """

    tokens: tuple[int, ...]
    text: str
    problem: str | None = None


class Engine(Protocol):
    """Answers, greedy or sampled. One call at a time, all from one thread."""

    @property
    def conv_mode(self) -> str:
        """The template of the prompts."""

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""

    def prompt(self, turns: Sequence[Turn], num_images: int) -> str:
        """The text to prepare of a conversation, by the model's template, with the place of each picture.

        Args:
            turns: a system text or none, then questions ("human") and answers ("gpt") in turn, a question last.
            num_images: pictures; they stand at `<image>` in the questions, or else in front of the first.

        Raises:
            ConversationError: other turns than these, or another number of `<image>`.
        """

    def prepare(self, text: str, images: Sequence[bytes], max_new_tokens: int) -> Query:
        """Check a prompt, its pictures and its length, before anything is computed.

        Raises:
            ImageError: a picture that cannot be decoded.
            PromptError: longer than the model takes, an answer of `max_new_tokens` included.
        """

    def answers(
        self, queries: Sequence[Query], max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> list[Answer]:
        """Answer prompts of any lengths as one batch; each answer is the one that it would get alone."""

    def stream(
        self, query: Query, max_new_tokens: int, sampling: Sampling = GREEDY
    ) -> Generator[str, None, None]:
        """Answer one prompt in pieces of `Answer.text`, as they come. Closing the iterator ends the generation."""


@dataclass(frozen=True)
class DrawingStep:
    """How far a drawing is.

    Attributes:
        done: positions with codes that have been drawn of each picture.
        total: of them.
        pictures: uint8 [n, P, P, 3] with the last step; None before.
    """

    done: int
    total: int
    pictures: NDArray[np.uint8] | None = None


@runtime_checkable
class DrawingEngine(Engine, Protocol):
    """An engine of a kind of model that may draw."""

    def draw(
        self, text: str, count: int, guidance: float, sampling: Sampling
    ) -> Generator[DrawingStep, None, None]:
        """Draw pictures of a text, as tools/draw.py does. Closing the iterator ends the drawing.

        Args:
            text: what to draw.
            count: of the pictures, n.
            guidance: how far the text counts.
            sampling: how codes are chosen; of more codes than there are (`top_k`), all are.

        Raises:
            SkipRow: a text that cannot be drawn, or a model that draws none; before the first step.
        """


class TextPieces:
    """Text of a growing list of tokens, in final pieces.

    A character may be spread over several tokens, each a byte of it, and white space at the end belongs to the answer
    only if something follows: both are held back.

    Args:
        decode: token ids -> text; a byte that is no whole character gives U+FFFD.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """Text that is final with this token; may be empty."""
        self._tokens.append(token)
        return self._piece(self._decode(self._tokens).rstrip(REPLACEMENT))

    def rest(self) -> str:
        """The text that was held back, when no token follows."""
        return self._piece(self._decode(self._tokens))

    def _piece(self, text: str) -> str:
        # Decoded anew each time: what a token means in text depends on its neighbours, and answers are short.
        text = text.strip()
        if not text.startswith(self._given):  # held back further, until it fits again
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


def check_length(length: int, max_new_tokens: int, max_length: int) -> None:
    """Raise PromptError if a prompt and its answer would not fit the model."""
    if length + max_new_tokens > max_length:
        raise PromptError(
            "prompt_too_long",
            f"{length:,} tokens, pictures included, and an answer of up to {max_new_tokens:,}; "
            f"the model takes {max_length:,} together",
        )


def check_drawing_length(length: int, positions: int, max_length: int) -> None:
    """Raise PromptError if a prompt and a picture of so many positions would not fit the model."""
    if length + positions - 1 > max_length:
        raise PromptError(
            "drawing_too_long",
            f"{length:,} tokens, and a picture has {positions:,} positions; the model takes {max_length:,} together",
        )


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of some texts."""
    found = [at for one in stop if one and (at := text.find(one)) >= 0]
    return text[: min(found)] if found else text
