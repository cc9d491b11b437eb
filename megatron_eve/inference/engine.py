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
from megatron_eve.models.text_format import IMAGE_TOKEN

REPLACEMENT = "\ufffd"
_MOST_BYTES = 4
OWN_TEMPLATE = "own"
"""In place of a template's name: the model has a chat template of its own."""
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
        stop: texts that end an answer; the answer ends before the first one found.
    """

    text: str
    images: tuple[bytes, ...]
    length: int
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        tokens: new token ids, without the one that ended the answer. Where a stop text ended it, those of that text
            are among them.
        text: their text up to a stop text, without white space around it.
        problem: why there is none, its reason in front as in "prompt_too_long: ..."; None where there is one. Only a
            server finds that out while it answers.
    """

    tokens: tuple[int, ...]
    text: str
    problem: str | None = None


@dataclass(frozen=True)
class ContinuationQuery:
    """A context and a text that may follow it, which an engine has checked.

    Attributes:
        text: the context: a prompt as `data.text.prompts.prompt_text` makes it, or any text, with an `<image>` for each
            picture; may be empty. White space at its end stands in front of the continuation instead.
        images: the image files' bytes, in order; each has been decoded once.
        continuation: the text whose likelihood is asked for.
        length: tokens of both, images expanded.
    """

    text: str
    images: tuple[bytes, ...]
    continuation: str
    length: int


@dataclass(frozen=True)
class LogLikelihood:
    """How likely a continuation is.

    Attributes:
        sum: of the log probabilities of its tokens (natural logarithm, float32 log_softmax).
        is_greedy: each token of it is the most likely one.
        problem: why there is none, as of `Answer`; None where there is one.
    """

    sum: float
    is_greedy: bool
    problem: str | None = None


class Engine(Protocol):
    """Answers, greedy or sampled, and log-likelihoods. One call at a time, all from one thread."""

    @property
    def conv_mode(self) -> str:
        """The template of the prompts; OWN_TEMPLATE of a model that has its own."""

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

    def prepare(
        self, text: str, images: Sequence[bytes], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Query:
        """Check a prompt, its pictures and its length, before anything is computed.

        Args:
            text: of the prompt, with an `<image>` for each picture.
            images: the image files' bytes, in order.
            max_new_tokens: limit of the answer's tokens, 1 or more.
            stop: texts that end the answer.

        Raises:
            ImageError: a picture that cannot be decoded.
            PromptError: longer than the model takes, an answer of `max_new_tokens` included, or with another number of
                `<image>` than of pictures.
        """

    def answers(self, queries: Sequence[Query], sampling: Sampling = GREEDY) -> list[Answer]:
        """Answer prompts of any lengths as one batch; each answer is the one that it would get alone."""

    def stream(self, query: Query, sampling: Sampling = GREEDY) -> Generator[str, None, None]:
        """Answer one prompt in pieces of `Answer.text`, as they come. Closing the iterator ends the generation."""

    def prepare_continuation(
        self, text: str, images: Sequence[bytes], continuation: str
    ) -> ContinuationQuery:
        """Check a context, its pictures, a text that may follow it and the length of both.

        Args:
            text: the context (see `ContinuationQuery`).
            images: the image files' bytes, in order.
            continuation: what may follow.

        Raises:
            ImageError: a picture that cannot be decoded.
            PromptError: longer than the model takes, a continuation without a token or with an `<image>`, or a context
                with another number of `<image>` than of pictures.
        """

    def log_likelihoods(self, queries: Sequence[ContinuationQuery]) -> list[LogLikelihood]:
        """How likely continuations are, as one batch. Of queries with the same context a part is computed once."""


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


@dataclass(frozen=True)
class DrawingQuery:
    """A text to draw that an engine has checked.

    Attributes:
        text: what to draw.
        name: of its random numbers: with another name the same text gives another picture.
    """

    text: str
    name: str


@runtime_checkable
class BatchDrawingEngine(DrawingEngine, Protocol):
    """An engine that draws pictures of several texts together."""

    def prepare_drawing(self, text: str, name: str) -> DrawingQuery:
        """Check a text before anything is drawn.

        Raises:
            SkipRow: as `DrawingEngine.draw`.
        """

    def pictures(
        self, queries: Sequence[DrawingQuery], guidance: float, sampling: Sampling
    ) -> NDArray[np.uint8]:
        """Draw a picture of each text, uint8 [n, P, P, 3]; each is the one that its query would get alone."""


class TextPieces:
    """Text of a growing list of tokens, in final pieces.

    A character may be spread over several tokens, each a byte of it, and white space at the end belongs to the answer
    only if something follows: both are held back.

    Args:
        decode: token ids -> text; a byte that is no whole character gives U+FFFD.
        stop: texts that end the answer; what may be the beginning of one is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(filter(None, stop))
        self._tokens: list[int] = []
        self._given = ""

    def add(self, token: int) -> str:
        """Text that is final with this token; may be empty."""
        self._tokens.append(token)
        text = cut_at_stop(self._decode(self._tokens).rstrip(REPLACEMENT), self._stop)
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        return self._piece(text[: len(text) - held])

    def rest(self) -> str:
        """The text that was held back, when no token follows."""
        return self._piece(cut_at_stop(self._decode(self._tokens), self._stop))

    def _piece(self, text: str) -> str:
        # Decoded anew each time: what a token means in text depends on its neighbours, and answers are short.
        text = text.strip()
        if not text.startswith(self._given):  # held back further, until it fits again
            return ""
        piece = text[len(self._given) :]
        self._given = text
        return piece


class AnswerEnd:
    """Says after which token an answer has ended, by its limit or by a stop text.

    A token costs the same at any length of the answer: only what may still change is decoded again.

    Args:
        decode: token ids -> text; a byte that is no whole character gives U+FFFD.
        max_new_tokens: limit of the answer's tokens.
        stop: texts that end it.
    """

    def __init__(self, decode: Callable[[list[int]], str], max_new_tokens: int, stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(filter(None, stop))
        self._left, self._longest = max_new_tokens, max(map(len, self._stop), default=0)
        # Tokens from a boundary between characters on, of which the first `_known` have the text `_text`; and what
        # came before it, as far as a stop text may reach.
        self._tokens: list[int] = []
        self._known, self._text, self._before = 0, "", ""

    def add(self, token: int) -> bool:
        """Does the answer end with this token?"""
        self._left -= 1
        if not self._stop:
            return self._left <= 0
        self._tokens.append(token)
        text = self._decode(self._tokens)
        seen = self._before + text[len(self._text) :]
        found = any(stop in seen for stop in self._stop)
        # The last tokens stay in front, so that the next one is not the first of its text: sentencepiece drops the
        # space in front of that. A character has four bytes at most: more tokens than these will make none.
        last = self._decode(self._tokens[self._known :])
        if last and (not text.endswith(REPLACEMENT) or len(self._tokens) - self._known > _MOST_BYTES):
            self._before = seen[len(seen) - self._longest + 1 :] if len(seen) >= self._longest else seen
            self._tokens, self._text = self._tokens[self._known :], last
            self._known = len(self._tokens)
        return found or self._left <= 0


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the texts that end it; one after the other, as lm-eval's models do it."""
    for one in stop:
        if one:
            text = text.split(one, 1)[0]
    return text


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def check_text(text: str) -> None:
    """Raise PromptError for a text that no tokenizer takes, with half of a surrogate pair in it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            "half_character", f"half of a surrogate pair, which is no text, at character {error.start:,}"
        ) from None


def check_images(text: str, count: int) -> None:
    """Raise PromptError if a text is none, or holds another number of `<image>` than there are pictures."""
    check_text(text)
    if (found := text.count(IMAGE_TOKEN)) != count:
        raise PromptError(
            "image_count",
            f"the text holds {found:,} {IMAGE_TOKEN} and {count:,} pictures came with it; {IMAGE_TOKEN} stands for a "
            "picture, and cannot be a word of a text",
        )


def check_length(length: int, max_new_tokens: int, max_length: int) -> None:
    """Raise PromptError if a prompt and its answer would not fit the model."""
    if max_new_tokens < 1:
        raise PromptError("no_answer", f"an answer of up to {max_new_tokens:,} tokens; it must be 1 or more")
    if length + max_new_tokens > max_length:
        raise PromptError(
            "prompt_too_long",
            f"{length:,} tokens, pictures included, and an answer of up to {max_new_tokens:,}; "
            f"the model takes {max_length:,} together",
        )


def check_continuation_length(length: int, max_length: int) -> None:
    """Raise PromptError if a context and its continuation would not fit the model, which never sees the last token."""
    if length - 1 > max_length:
        raise PromptError(
            "prompt_too_long",
            f"{length:,} tokens, pictures and continuation included; the model takes {max_length + 1:,}",
        )


def check_drawing_length(length: int, positions: int, max_length: int) -> None:
    """Raise PromptError if a prompt and a picture of so many positions would not fit the model."""
    if length + positions - 1 > max_length:
        raise PromptError(
            "drawing_too_long",
            f"{length:,} tokens, and a picture has {positions:,} positions; the model takes {max_length:,} together",
        )
