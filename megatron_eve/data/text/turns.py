"""The turns of a row, validated, and what a text without visible characters is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_eve.data.errors import SkipRow
from megatron_eve.models.text_format import IMAGE_TOKEN

MAX_CHARACTERS = 4_000_000
"""Limit for the texts of one row together; at most --model-max-length tokens of them are kept."""

SYSTEM_ROLE = "system"
_ROLES = ("human", "gpt", SYSTEM_ROLE)

# Image placeholders of other models and data sets, searched anywhere in a text: <image1>, <image_2>, <|image_pad|> ...
_OTHER_PLACEHOLDER = re.compile(
    r"<\|?(?:image|img|video)[ _-]?(?:\d+|pad|placeholder|token|here)\|?>|<\|(?:image|video)\|>",
    re.IGNORECASE,
)
# Searched only as the first or last line of a question, since they are also HTML tags: <video>, <Image> ...
_LONE_PLACEHOLDER = re.compile(r"<(?:image|img|picture|photo|video|audio)s?>", re.IGNORECASE)

# Invisible characters that Unicode counts as letters, marks or symbols: Hangul and Khmer fillers, Braille blank.
_BLANK_LETTERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


class ConversationError(SkipRow):
    """A conversation that does not fit the template; `reason` is for example "unknown_role" or "image_count"."""


@dataclass(frozen=True)
class Turn:
    """One turn: role "human", "gpt" or "system", and a text of valid Unicode."""

    role: str
    text: str


def checked_turns(turns: object) -> list[Turn]:
    """Validate the turns of a row and return them.

    Raises:
        ConversationError: they are not turns, or a text is too long or not valid Unicode.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ConversationError("no_conversation", "'conversations' is not a list of turns, or is empty")
    checked = []
    characters = 0
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise ConversationError("no_conversation", f"turn {number} is not an object")
        role, text = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in _ROLES:
            raise ConversationError(
                "unknown_role", f"turn {number} is from {role!r:.80}, not 'human', 'gpt' or 'system'"
            )
        if not isinstance(text, str):
            raise ConversationError("value_not_text", f"the value of turn {number} is {type(text).__name__}")
        characters += len(text)
        if characters > MAX_CHARACTERS:  # the tokenizer takes 80 bytes for each
            raise ConversationError(
                "text_too_long", f"more than {MAX_CHARACTERS} characters up to turn {number}"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ConversationError(
                "text_not_unicode", f"half of a surrogate pair in turn {number}"
            ) from None
        # An answer of invisible characters counts as empty: there is nothing to learn from it.
        checked.append(Turn(role, "" if role == "gpt" and is_blank(text) else text))
    return checked


def is_blank(text: str) -> bool:
    """Whether a text has no visible character: only white space, control, zero-width and other blank characters."""
    return all(
        character.isspace()
        or unicodedata.category(character) in {"Zs", "Zl", "Zp", "Cc", "Cf"}
        or character in _BLANK_LETTERS
        or "\ufe00" <= character <= "\ufe0f"
        for character in text
    )


def check_image_count(placeholders: int, num_images: int) -> None:
    """Raise ConversationError unless the text has exactly one `<image>` for each picture."""
    if placeholders == num_images:
        return
    reason = "image_count"
    if placeholders == 0:
        reason = "image_without_placeholder"
    elif num_images == 0:
        reason = "placeholder_without_image"
    raise ConversationError(reason, f"images: {num_images}, {IMAGE_TOKEN} in the text: {placeholders}")


def check_placeholders(turns: list[Turn]) -> None:
    """Refuse placeholders of other models, which would be kept as plain text about an image that is missing."""
    for turn in turns:
        found = _OTHER_PLACEHOLDER.search(turn.text)
        if found is None and turn.role == "human":
            lines = turn.text.strip().split("\n")
            lone = (_LONE_PLACEHOLDER.fullmatch(line.strip()) for line in (lines[0], lines[-1]))
            found = next((match for match in lone if match and match[0] != IMAGE_TOKEN), None)
        if found:
            raise ConversationError("other_placeholder", f"the text holds {found[0]}, not {IMAGE_TOKEN}")
