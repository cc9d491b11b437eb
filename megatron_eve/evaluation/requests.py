"""Requests: what a harness (lmms-eval or lm-eval) asks of a model, and the key by which an answer is found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from functools import cached_property
from typing import Literal

from megatron_eve.data.text.turns import Turn
from megatron_eve.inference.sampling import DRAWING, GUIDANCE, Sampling

Kind = Literal["generate", "log_likelihood", "draw", "reconstruct", "classify"]
TOWER_KINDS = ("reconstruct", "classify")
"""Kinds that the tower of codes answers, without a language model."""
PICTURE_KINDS = ("draw", *TOWER_KINDS)
"""Kinds of requests to models that read and draw pictures as codes (`picture_answering.py`)."""


@dataclass(frozen=True)
class Conversation:
    """What a model is asked.

    Attributes:
        turns: of "human", "gpt" and "system"; the last is the question. An `<image>` stands at each picture's place,
            unless no text holds one: then the pictures stand in front of the first question.
        images: the pictures' files, in order.
    """

    turns: tuple[Turn, ...]
    images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Request:
    """One request of a harness.

    The text of an answer to "draw" and "reconstruct" is the path of a PNG file, relative to the folder of the answers
    (`answers.picture_path`); of one to "classify" the numbers of the most likely classes, the first one first, with
    spaces between.

    Attributes:
        task: its name.
        split: of its dataset.
        doc_id: row of the split.
        number: which of the row's requests.
        kind: "generate" an answer, or the "log_likelihood" of a continuation; "draw" a picture of the context;
            "reconstruct" the conversation's picture from its codes; "classify" it.
        context: the text that the harness made; it names the request, and is what a task of text continues.
        conversation: makes the conversation, which opens the pictures; None for a context that is continued as it is.
        continuation: of a log-likelihood.
        max_new_tokens: limit of a generated answer, in tokens.
        stop: texts that end a generated answer.
        shots: examples in front of the question.
        guidance: of "draw": how far the text counts (`--cfg` of tools/draw.py).
        sampling: of "draw": how codes are chosen. The random numbers depend on its seed and the request's key alone.
        classes: of "classify": texts of each class; the context has their digest.
    """

    task: str
    split: str
    doc_id: int
    number: int
    kind: Kind
    context: str
    conversation: Callable[[], Conversation] | None = field(default=None, compare=False, repr=False)
    continuation: str = ""
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    shots: int = 0
    guidance: float = GUIDANCE
    sampling: Sampling = DRAWING
    classes: tuple[tuple[str, ...], ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def key(self) -> str:
        """The name of its answer: a digest of all that the answer depends on but the model and the data."""
        parts = [
            self.task, self.split, self.doc_id, self.number, self.kind, self.conversation is not None, self.context,
            self.continuation, self.max_new_tokens, self.stop, self.shots,
        ]  # fmt: skip
        if self.kind == "draw":
            parts += [self.guidance, astuple(self.sampling)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def of_shard(requests: Sequence[Request], shard: int, shards: int) -> list[Request]:
    """The requests of a shard: every `shards`-th row of a dataset, with all requests of the row.

    They stay together because they may share their context, which is then computed once.
    """
    rows: dict[tuple[str, str, int], int] = {}
    chosen = []
    for request in requests:
        row = rows.setdefault((request.task, request.split, request.doc_id), len(rows))
        if row % shards == shard:
            chosen.append(request)
    return chosen


def rows_of(requests: Sequence[Request]) -> list[list[Request]]:
    """The requests of each row of a dataset, in the order of the rows."""
    rows: dict[tuple[str, str, int], list[Request]] = {}
    for request in requests:
        rows.setdefault((request.task, request.split, request.doc_id), []).append(request)
    return list(rows.values())
