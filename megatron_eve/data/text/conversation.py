"""LLaVA conversations -> token ids and labels, by the published templates.

`plain`: `<s>`, the images, the caption, a newline; the caption and the newline train.
`vicuna_v1`: "SYSTEM USER: question ASSISTANT: answer</s>USER: ..."; answers and `</s>` train.

Labels come from where each answer stands in the text, never from tokenising parts again and comparing
lengths: that way of the published code loses whole conversations to a mismatch.
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
"""Stands for one picture in token ids until the loader expands it."""

IGNORE_INDEX = -100
"""Label of a position that does not train."""

MAX_CHARACTERS = 4_000_000
"""Of the texts of one row, of which no more than --model-max-length tokens are kept."""

PROMPT_TEMPLATES = frozenset({"plain", "vicuna_v1"})
"""Templates of conversations, which a model can be asked with."""

TEMPLATES = PROMPT_TEMPLATES | {"document"}
"""All that a dataset can be made with; "document", which no prompt has, is in `data/text/documents.py`."""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_ROLES = {"human": "USER", "gpt": "ASSISTANT"}
IMAGE_SPLIT = re.compile(f"({re.escape(IMAGE_TOKEN)})")
"""Cuts a text at its placeholders, which `split` keeps."""

# How other models and data sets write a picture's place. Anywhere in a text: <image1>, <image_2>, <|image_pad|> ...
_OTHER_PLACEHOLDER = re.compile(
    r"<\|?(?:image|img|video)[ _-]?(?:\d+|pad|placeholder|token|here)\|?>|<\|(?:image|video)\|>",
    re.IGNORECASE,
)
# As the first or last line of a question alone, since they are also HTML: <video>, <Image> ...
_LONE_PLACEHOLDER = re.compile(r"<(?:image|img|picture|photo|video|audio)s?>", re.IGNORECASE)

# Characters that show nothing although Unicode counts them as letters, marks or symbols: fillers and Braille blank.
_BLANK_LETTERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")


class ConversationError(SkipRow):
    """A conversation that the template cannot take; `reason` is such as "unknown_role" or "image_count"."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation, before images are expanded and labels shifted.

    Attributes:
        tokens: n ids; an image is one IMAGE_TOKEN_ID.
        labels: n values; the token itself where it trains, else IGNORE_INDEX.
        ends_in_text: pictures at the end of what is left by `cut` go, too: no text follows that they could teach.
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
    """One turn: role "human" or "gpt", and a text of valid Unicode."""

    role: str
    text: str


def encode_conversation(
    turns: Sequence[Mapping[str, object]], tokenizer: Tokenizer, template: str, num_images: int
) -> Encoded:
    """Tokenise one conversation in the LLaVA layout.

    Args:
        turns: `[{"from": "human" | "gpt", "value": text}, ...]`. Of `vicuna_v1`, a first turn from "gpt" is
            dropped, as published.
        template: "plain" or "vicuna_v1".
        num_images: pictures that belong to the row; the text must hold as many `<image>`.

    Raises:
        ConversationError: the conversation does not fit the template; `reason` says how.
        ValueError: an unknown template.
    """
    _check_template(template)
    checked = checked_turns(turns)
    _check_placeholders(checked)
    if template == "plain":
        return _encode_plain(checked, tokenizer, num_images)
    if checked[0].role == "gpt":
        checked = checked[1:]
    for number, turn in enumerate(checked):
        expected = ("human", "gpt")[number % 2]
        if turn.role != expected:
            raise ConversationError(
                "role_order", f"a turn from {turn.role!r} where one from {expected!r} is due"
            )
    if not checked:
        raise ConversationError(
            "no_conversation", "a single turn, from 'gpt', which is dropped when it is first"
        )
    check_image_count(sum(turn.text.count(IMAGE_TOKEN) for turn in checked), num_images)
    return _encode_marked(_vicuna_parts(checked), tokenizer)


def prompt_text(
    question: str,
    template: str,
    num_images: int,
    earlier: Sequence[tuple[str, str]] = (),
    system: str = VICUNA_SYSTEM,
) -> str:
    """The text to generate from, with an `<image>` for each picture, as the published evaluation builds it.

    `plain` gives the images and ignores the question. `vicuna_v1` ends in "ASSISTANT:", and is the beginning of a
    training sample with the same turns. Images go in front of the first question, each with a newline, unless the
    questions already say where they stand.

    Args:
        earlier: the questions before this one, each with its answer (vicuna_v1).

    Raises:
        ConversationError: the questions hold `<image>`, but not as often as there are images, or an answer holds one.
        ValueError: an unknown template.
    """
    _check_template(template)
    if template == "plain":
        return IMAGE_TOKEN * num_images
    if any(IMAGE_TOKEN in told for _, told in earlier):
        raise ConversationError("image_in_answer", f"an earlier answer holds {IMAGE_TOKEN}")
    said = "".join(
        f"USER: {asked} ASSISTANT:{'' if is_blank(told) else f' {told}</s>'}" for asked, told in earlier
    )
    said += f"USER: {question} ASSISTANT:"
    if IMAGE_TOKEN not in said:
        said = said.replace("USER: ", "USER: " + f"{IMAGE_TOKEN}\n" * num_images, 1)
    check_image_count(said.count(IMAGE_TOKEN), num_images)
    return f"{system} {said}"


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
    """The turns of a row, each with its role and its text.

    Raises:
        ConversationError: they are no turns, or a text is too long or not valid Unicode.
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
            raise ConversationError("unknown_role", f"turn {number} is from {role!r}, not 'human' or 'gpt'")
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
        # An answer in which nothing can be seen is an empty one: there is nothing to learn from it.
        checked.append(Turn(role, "" if role == "gpt" and is_blank(text) else text))
    return checked


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control and zero-width characters, fillers and variation selectors."""
    return all(
        character.isspace()
        or unicodedata.category(character) in {"Zs", "Zl", "Zp", "Cc", "Cf"}
        or character in _BLANK_LETTERS
        or "\ufe00" <= character <= "\ufe0f"
        for character in text
    )


def _check_placeholders(turns: list[Turn]) -> None:
    """Refuse the placeholders of other models: a row with them would be kept as text about a picture it has not."""
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


def _place_image(text: str) -> str:
    """A sentence's only image moves to its front, as published; several stay where they are."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def _vicuna_parts(turns: list[Turn]) -> list[tuple[str, bool]]:
    """The conversation as stretches of text, each with whether it trains.

    An answer's stretch begins with the space after "ASSISTANT:", since pieces carry their leading space.
    A turn without text is its role and a colon alone, as published: an empty answer trains nothing.
    """
    parts = [(VICUNA_SYSTEM + " ", False)]
    for turn in turns:
        text = _place_image(turn.text)
        parts.append((f"{_ROLES[turn.role]}:", False))
        if text and turn.role == "gpt":
            parts.append((f" {text}</s>", True))
        elif text:
            parts.append((f" {text} ", False))
    return parts


def _encode_marked(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> Encoded:
    """Tokenise the stretches as one text; a token trains if the character it begins at does."""
    text = "".join(part for part, _ in parts)
    trains = b"".join((b"\1" if trained else b"\0") * len(part) for part, trained in parts)
    tokens, labels, start = [tokenizer.bos_id], [IGNORE_INDEX], 0
    for stretch in IMAGE_SPLIT.split(text):
        if stretch == IMAGE_TOKEN:
            tokens.append(IMAGE_TOKEN_ID)
            labels.append(IGNORE_INDEX)
        else:
            for token, begin in tokenizer.encode_with_offsets(stretch):
                tokens.append(token)
                labels.append(token if trains[start + begin] else IGNORE_INDEX)
        start += len(stretch)
    return Encoded(tokens, labels)
