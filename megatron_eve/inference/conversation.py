"""The conversation on the chat's page: questions, drawings, and what the page shows of them. Needs no Gradio."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_eve.inference.chat import Asked, AskedDrawing, Limits, Refused


@dataclass(frozen=True)
class PageTurn:
    """A question and its answer on the page, or a text and the pictures that were drawn of it.

    Attributes:
        question: its text; of a drawing, what to draw.
        files: pictures that came with it.
        answer: as far as it was generated.
        refusal: why there is no answer.
        loading: it waits for the model, which is being loaded.
        draws: pictures are to be drawn.
        count: of these.
        guidance: of these.
        progress: how far a drawing is, while it is drawn.
        drawn: files of the pictures that were drawn.
    """

    question: str
    files: tuple[str, ...] = ()
    answer: str | None = None
    refusal: str | None = None
    loading: bool = False
    draws: bool = False
    count: int = 1
    guidance: float = 1.0
    progress: str | None = None
    drawn: tuple[str, ...] = ()

    def anew(self) -> PageTurn:
        """The same, not yet answered."""
        return replace(self, answer=None, refusal=None, progress=None, drawn=())

    def messages(self) -> Iterator[dict[str, Any]]:
        """Escaped for Gradio's chatbot, which would read a text as HTML."""
        for path in self.files:
            yield {"role": "user", "content": {"path": path}}
        yield {"role": "user", "content": _text(f"Draw: {self.question}" if self.draws else self.question)}
        for path in self.drawn:
            yield {"role": "assistant", "content": {"path": path, "alt_text": self.question}}
        if self.refusal is not None:
            yield {"role": "assistant", "content": _text(self.refusal), "metadata": {"title": "Not answered"}}
        elif self.answer is not None:
            yield {"role": "assistant", "content": _text(self.answer)}
        elif self.loading:
            yield {"role": "assistant", "content": _text("The model is being loaded; the answer comes then.")}
        elif self.draws and not self.drawn:
            yield {"role": "assistant", "content": _text(self.progress or "Not drawn to the end.")}


@dataclass(frozen=True)
class Conversation:
    """The conversation on a page so far. The pictures all belong to the first question, as `Asked` has it.

    Drawings stand in it for the page alone: a question is asked without those before it.
    """

    turns: tuple[PageTurn, ...] = ()

    def after(self, turn: PageTurn) -> Conversation:
        """With one more."""
        return Conversation((*self.turns, replace(turn, progress=None)))

    def messages(self, *more: PageTurn) -> list[dict[str, Any]]:
        """What the page shows, with more turns."""
        return [message for one in (*self.turns, *more) for message in one.messages()]

    def asked(self, turn: PageTurn, limits: Limits) -> Asked | AskedDrawing:
        """The question of a turn after what was answered before, or what it draws.

        Raises:
            Refused: pictures that are too large together (Gradio has looked at each while it arrived), or beside a text
                that is to be drawn.
        """
        if turn.draws:
            if turn.files:
                raise Refused("Pictures are drawn from text alone: remove the picture from the box.")
            return AskedDrawing(turn.question, turn.count, turn.guidance)
        answered = [one for one in self.turns if one.refusal is None and one.answer]
        images: list[bytes] = []
        for path in (Path(file) for one in (*answered, turn) for file in one.files):
            if sum(map(len, images)) + path.stat().st_size > limits.upload_bytes:
                limit = f"{limits.upload_bytes / (1 << 20):.0f} MiB"
                raise Refused(f"The pictures of a conversation may have {limit} together.")
            images.append(path.read_bytes())
        earlier = tuple((one.question, one.answer or "") for one in answered)
        return Asked(turn.question, earlier, tuple(images))


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": html.escape(text)}
