"""Tokenises LLaVA conversations into token ids and labels, with the published templates.

`plain`: `<s>`, the images, the caption, a newline; the caption and the newline train.
`vicuna_v1`: "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."; answers and `</s>` train. SYSTEM is the system turn
of the row if it has one, else the prompt of the published training.

Labels come from the character range of each answer. The published code tokenises parts again and compares lengths,
and drops a whole conversation when these do not match.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_eve.data.errors import SkipRow
from megatron_eve.data.text.tokenizer import Tokenizer

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
"""Id of an image placeholder: one image in token ids, until the loader expands it."""

IGNORE_INDEX = -100
"""Label of a position that does not train."""

MAX_CHARACTERS = 4_000_000
"""Limit for the texts of one row together; at most --model-max-length tokens of them are kept."""

PROMPT_TEMPLATES = frozenset({"plain", "vicuna_v1"})
"""Templates of conversations, which can also build a prompt for generation."""

TEMPLATES = PROMPT_TEMPLATES | {"document"}
"""All templates of datasets. "document" (`data/text/documents.py`) cannot build a prompt."""

WITHOUT_CONVERSATION = {"plain": "captions", "document": "documents"}
"""Templates whose samples teach no conversation, and what the samples are."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

SYSTEM_ROLE = "system"
_ROLES = {"human": "USER", "gpt": "ASSISTANT"}
IMAGE_SPLIT = re.compile(f"({re.escape(IMAGE_TOKEN)})")
"""Splits a text at its placeholders; `split` keeps them."""

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
class Encoded:
    """A tokenised conversation, before images are expanded and labels shifted.

    Attributes:
        tokens: n ids; an image is one IMAGE_TOKEN_ID.
        labels: n values; the token itself where it trains, else IGNORE_INDEX.
        ends_in_text: `cut` also drops images at the end, since no text after them could be learned from them.
    """

    tokens: list[int]
    labels: list[int]
    ends_in_text: bool = False

    @property
    def num_images(self) -> int:
        """Image placeholders among the tokens."""
        return self.tokens.count(IMAGE_TOKEN_ID)

    @property
    def num_labels(self) -> int:
        """Labels that train once labels are shifted: the first position is never predicted."""
        labels = self.labels[1:]
        return len(labels) - labels.count(IGNORE_INDEX)

    def cut(self, length: int) -> Encoded:
        """The first `length` positions, an image counted as one, as published (`model_max_length`)."""
        length = min(length, len(self.tokens))
        while self.ends_in_text and length and self.tokens[length - 1] == IMAGE_TOKEN_ID:
            length -= 1
        return replace(self, tokens=self.tokens[:length], labels=self.labels[:length])


@dataclass(frozen=True)
class Turn:
    """One turn: role "human", "gpt" or "system", and a text of valid Unicode."""

    role: str
    text: str


def encode_conversation(
    turns: Sequence[Mapping[str, object]], tokenizer: Tokenizer, template: str, num_images: int
) -> Encoded:
    """Tokenise one conversation in the LLaVA layout.

    Args:
        turns: `[{"from": "human" | "gpt", "value": text}, ...]`. With `vicuna_v1`, a first turn from "gpt"
            is dropped, as published. In front of them may be one from "system", which takes the place of
            `VICUNA_SYSTEM` unless it is blank; `plain` has no system prompt and ignores it.
        template: "plain" or "vicuna_v1".
        num_images: images of the row; the text must hold as many `<image>`.

    Raises:
        ConversationError: the conversation does not fit the template; `reason` says how.
        ValueError: an unknown template.
    """
    _check_template(template)
    checked = checked_turns(turns)
    _check_placeholders(checked)
    system, checked = _split_system(checked)
    if template == "plain":
        return _encode_plain(checked, tokenizer, num_images)
    if checked and checked[0].role == "gpt":
        checked = checked[1:]
    for number, turn in enumerate(checked):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            raise ConversationError(
                "role_order", f"a turn from {turn.role!r} where one from {expected!r} is expected"
            )
    if not checked:
        raise ConversationError(
            "no_conversation",
            "no turn but one from 'system', or from 'gpt', which is dropped when it is first",
        )
    check_image_count(sum(turn.text.count(IMAGE_TOKEN) for turn in checked), num_images)
    return _encode_marked(_vicuna_parts(system, checked), tokenizer)


def prompt_text(
    question: str,
    template: str,
    num_images: int,
    earlier: Sequence[tuple[str, str]] = (),
    system: str = VICUNA_SYSTEM,
) -> str:
    """The text to generate from, with an `<image>` for each picture, as the published evaluation builds it.

    `plain` returns the image placeholders and ignores the question. `vicuna_v1` ends in "ASSISTANT:" and is a prefix
    of a training sample with the same turns. Placeholders go in front of the first question, each with a newline,
    unless the questions already hold them.

    Args:
        earlier: the questions before this one, each with its answer (vicuna_v1).

    Raises:
        ConversationError: the questions hold another number of `<image>` than there are images, or an answer holds one.
        ValueError: an unknown template.
    """
    _check_template(template)
    if template == "plain":
        return IMAGE_TOKEN * num_images
    if any(IMAGE_TOKEN in answer for _, answer in earlier):
        raise ConversationError("image_in_answer", f"an earlier answer holds {IMAGE_TOKEN}")
    prompt = "".join(
        f"USER: {asked} ASSISTANT:{'' if is_blank(answer) else f' {answer}</s>'}" for asked, answer in earlier
    )
    prompt += f"USER: {question} ASSISTANT:"
    if IMAGE_TOKEN not in prompt:
        prompt = prompt.replace("USER: ", "USER: " + f"{IMAGE_TOKEN}\n" * num_images, 1)
    check_image_count(prompt.count(IMAGE_TOKEN), num_images)
    return f"{system} {prompt}"


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a prompt's text, BOS in front, each `<image>` as IMAGE_TOKEN_ID."""
    return _encode_marked([(text, False)], tokenizer).tokens


def encode_prompt(
    question: str,
    tokenizer: Tokenizer,
    template: str,
    num_images: int,
    earlier: Sequence[tuple[str, str]] = (),
    system: str = VICUNA_SYSTEM,
) -> list[int]:
    """Token ids to generate from: `prompt_text`, encoded. Raises as that does."""
    return encode_text(prompt_text(question, template, num_images, earlier, system), tokenizer)


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


def _check_template(template: str) -> None:
    if template not in PROMPT_TEMPLATES:
        raise ValueError(f"unknown template {template!r}: use one of {', '.join(sorted(PROMPT_TEMPLATES))}")


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
        if not isinstance(role, str) or role not in (*_ROLES, SYSTEM_ROLE):
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


def _check_placeholders(turns: list[Turn]) -> None:
    """Refuse placeholders of other models, which would be kept as plain text about an image that is missing."""
    for turn in turns:
        found = _OTHER_PLACEHOLDER.search(turn.text)
        if found is None and turn.role == "human":
            lines = turn.text.strip().split("\n")
            lone = (_LONE_PLACEHOLDER.fullmatch(line.strip()) for line in (lines[0], lines[-1]))
            found = next((match for match in lone if match and match[0] != IMAGE_TOKEN), None)
        if found:
            raise ConversationError("other_placeholder", f"the text holds {found[0]}, not {IMAGE_TOKEN}")


def _encode_plain(turns: list[Turn], tokenizer: Tokenizer, num_images: int) -> Encoded:
    if len(turns) != 2:
        raise ConversationError("plain_turns", f"{len(turns)} turns, not a question and a caption")
    question, caption = turns
    if (question.role, caption.role) != ("human", "gpt"):
        raise ConversationError("role_order", f"turns are from {question.role!r}, {caption.role!r}")
    if IMAGE_TOKEN in caption.text:
        raise ConversationError("image_in_caption", f"the caption holds {IMAGE_TOKEN}")
    check_image_count(question.text.count(IMAGE_TOKEN), num_images)
    if num_images == 0:
        raise ConversationError("plain_without_image", "no image to caption; text belongs to vicuna_v1")
    caption_ids = tokenizer.encode(caption.text + "\n") if caption.text else []
    head = [tokenizer.bos_id] + [IMAGE_TOKEN_ID] * num_images
    return Encoded(head + caption_ids, [IGNORE_INDEX] * len(head) + caption_ids)


def _split_system(turns: list[Turn]) -> tuple[str, list[Turn]]:
    """The system prompt of a conversation, and its other turns."""
    if turns[0].role != SYSTEM_ROLE:
        return VICUNA_SYSTEM, turns
    if IMAGE_TOKEN in turns[0].text:
        raise ConversationError("image_in_system", f"the system turn holds {IMAGE_TOKEN}")
    return VICUNA_SYSTEM if is_blank(turns[0].text) else turns[0].text, turns[1:]


def _place_image(text: str) -> str:
    """Move the only image of a turn to its front, as published; several images stay where they are."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _vicuna_parts(system: str, turns: list[Turn]) -> list[tuple[str, bool]]:
    """The conversation as (text segment, whether it trains) pairs.

    An answer's segment begins with the space after "ASSISTANT:", since sentencepiece keeps the space in front of a
    word in its piece. A turn without text is only its role and a colon, as published; an empty answer trains nothing.
    """
    parts = [(f"{system} ", False)]
    for turn in turns:
        text = _place_image(turn.text)
        parts.append((f"{_ROLES[turn.role]}:", False))
        if text and turn.role == "gpt":
            parts.append((f" {text}</s>", True))
        elif text:
            parts.append((f" {text} ", False))
    return parts


def _encode_marked(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> Encoded:
    """Tokenise the segments as one text; a token trains if its first character does."""
    text = "".join(part for part, _ in parts)
    trains = b"".join((b"\1" if trained else b"\0") * len(part) for part, trained in parts)
    tokens, labels, start = [tokenizer.bos_id], [IGNORE_INDEX], 0
    for segment in IMAGE_SPLIT.split(text):
        if segment == IMAGE_TOKEN:
            tokens.append(IMAGE_TOKEN_ID)
            labels.append(IGNORE_INDEX)
        else:
            for token, begin in tokenizer.encode_with_offsets(segment):
                tokens.append(token)
                labels.append(token if trains[start + begin] else IGNORE_INDEX)
        start += len(segment)
    return Encoded(tokens, labels)
