"""Turns as messages: what chat templates of transformers and servers with OpenAI's interface take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_eve.data.text.prompts import place_images, split_turns
from megatron_eve.data.text.turns import Turn
from megatron_eve.models.text_format import IMAGE_TOKEN

_ROLES = {"human": "user", "gpt": "assistant"}
# A placeholder with the newline that sets it apart from the text, which a template writes by itself.
_PLACEHOLDER = re.compile(rf"({re.escape(IMAGE_TOKEN)})\n?")


def messages_of(turns: Sequence[Turn], num_images: int) -> list[dict[str, Any]]:
    """Messages with contents of parts: `{"type": "text", "text": ...}` and `{"type": "image"}`, one for each `<image>`.

    Args:
        turns: a system text or none, then questions and answers in turn, a question last.
        num_images: of the pictures; without `<image>` in any turn they stand in front of the first question.

    Raises:
        ConversationError: other turns than these, or another number of `<image>` than of pictures.
    """
    system, talk = split_turns(turns)
    found = [
        {"role": _ROLES[turn.role], "content": _parts(turn.text)} for turn in place_images(talk, num_images)
    ]
    return found if system is None else [{"role": "system", "content": _parts(system)}, *found]


def _parts(text: str) -> list[dict[str, Any]]:
    """A turn's text and pictures, in order."""
    parts: list[dict[str, Any]] = []
    for piece in _PLACEHOLDER.split(text):
        if piece == IMAGE_TOKEN:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]
