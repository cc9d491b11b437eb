"""Turns as messages: what chat templates of transformers and servers with OpenAI's interface take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_eve.data.text.turns import SYSTEM_ROLE, ConversationError, Turn, check_image_count
from megatron_eve.models.text_format import IMAGE_TOKEN

_ROLES = {SYSTEM_ROLE: "system", "human": "user", "gpt": "assistant"}
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
    turns = list(turns)
    talk = turns[1:] if turns and turns[0].role == SYSTEM_ROLE else turns
    if len(talk) % 2 == 0 or any(turn.role != ("human", "gpt")[at % 2] for at, turn in enumerate(talk)):
        raise ConversationError("unknown_role", "turns of a prompt are of human and gpt in turn, from human to human")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role != "human"):
        raise ConversationError("image_in_answer", f"an earlier answer or the system text holds {IMAGE_TOKEN}")
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in talk)
    if found == 0:
        turns[len(turns) - len(talk)] = Turn("human", f"{IMAGE_TOKEN}\n" * num_images + talk[0].text)
        found = num_images
    check_image_count(found, num_images)
    return [{"role": _ROLES[turn.role], "content": _parts(turn.text)} for turn in turns]


def _parts(text: str) -> list[dict[str, Any]]:
    """A turn's text and pictures, in order."""
    parts: list[dict[str, Any]] = []
    for piece in _PLACEHOLDER.split(text):
        if piece == IMAGE_TOKEN:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts or [{"type": "text", "text": ""}]
