"""Tokenises LLaVA conversations into token ids and labels, with the templates of `data/text/templates.py`.

Labels come from the character range of each answer. The published code tokenises parts again and compares lengths,
and drops a whole conversation when these do not match.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from megatron_eve.data.text.literal_text import encode_marked_text, mark_typed
from megatron_eve.data.text.templates import template_of
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import (
    SYSTEM_ROLE,
    ConversationError,
    Turn,
    check_image_count,
    check_placeholders,
    checked_turns,
    is_blank,
)
from megatron_eve.models.text_format import IMAGE_TOKEN, Template

IMAGE_TOKEN_ID = -200
"""Id of an image placeholder: one image in token ids, until the loader expands it."""

IGNORE_INDEX = -100
"""Label of a position that does not train."""

NOT_TEXT_LABELS = (IGNORE_INDEX, IMAGE_TOKEN_ID)
"""Values of labels that are no token to predict. IMAGE_TOKEN_ID, at a placeholder, says that the image is to be drawn:
its codes are to be predicted."""

IMAGE_SPLIT = re.compile(f"({re.escape(IMAGE_TOKEN)})")
"""Splits a text at its placeholders; `split` keeps them."""


@dataclass(frozen=True)
class Encoded:
    """A tokenised conversation, before images are expanded and labels shifted.

    Attributes:
        tokens: n ids; an image is one IMAGE_TOKEN_ID, or one for each of its tiles.
        labels: n values; the token itself where it trains, IMAGE_TOKEN_ID at an image that is to be drawn, else
            IGNORE_INDEX.
        ends_in_text: `cut` also drops images at the end that are read, since no text after them could be learned from
            them.
    """

    tokens: list[int]
    labels: list[int]
    ends_in_text: bool = False

    @property
    def num_images(self) -> int:
        """Image placeholders among the tokens."""
        return self.tokens.count(IMAGE_TOKEN_ID)

    def whole_images(self, tiles: Sequence[int]) -> int:
        """Images of which all tiles have their placeholders; `tiles` are those of each image of the row."""
        return bisect_right(list(accumulate(tiles)), self.num_images)

    @property
    def num_labels(self) -> int:
        """Tokens that train once labels are shifted: the first position is never predicted."""
        labels = self.labels[1:]
        return len(labels) - sum(labels.count(value) for value in NOT_TEXT_LABELS)

    @property
    def num_drawn(self) -> int:
        """Image placeholders of images that are to be drawn."""
        return self.labels.count(IMAGE_TOKEN_ID)

    def cut(self, length: int, image_rows: Sequence[Sequence[int]] | None = None) -> Encoded:
        """The first `length` positions.

        Args:
            length: positions that are kept at most.
            image_rows: positions that the tiles of each image take, or the frames of a video that is to be drawn; what
                does not fit whole is dropped with all that follows. None: each placeholder counts as one.
        """
        kept = min(length, len(self.tokens))
        if image_rows is not None:
            rows, kept = iter([tile for image in image_rows for tile in image]), 0
            for token in self.tokens:
                length -= next(rows) if token == IMAGE_TOKEN_ID else 1
                if length < 0:
                    break
                kept += 1
            kept = self._before_parts(kept, [len(image) for image in image_rows])
        if 0 < kept < len(self.tokens) and self.labels[kept] == IMAGE_TOKEN_ID:
            kept -= 1  # what announces an image to draw goes with it
        while (
            self.ends_in_text
            and kept
            and self.tokens[kept - 1] == IMAGE_TOKEN_ID
            and self.labels[kept - 1] == IGNORE_INDEX
        ):
            kept -= 1
        return replace(self, tokens=self.tokens[:kept], labels=self.labels[:kept])

    def _before_parts(self, kept: int, tiles: Sequence[int]) -> int:
        """`kept` positions without an image at their end that has more tiles behind them."""
        places = [place for place, token in enumerate(self.tokens) if token == IMAGE_TOKEN_ID]
        first = 0
        for count in tiles:
            if first < len(places) and places[first] < kept <= places[min(first + count, len(places)) - 1]:
                return places[first]
            first += count
        return kept


def tiled_text(text: str, tiles: Iterable[int]) -> str:
    """A text in which each `<image>` is one for each tile of its image, with a newline behind each, as published.

    Args:
        text: with one `<image>` for each image.
        tiles: of each image, in order; as many as the text takes are used of an iterator.
    """
    counts = iter(tiles)
    return IMAGE_SPLIT.sub(lambda _: f"{IMAGE_TOKEN}\n" * next(counts, 1), text)


def encode_conversation(
    turns: Sequence[Mapping[str, object]],
    tokenizer: TextTokenizer,
    template: str | Template,
    num_images: int,
    tiles: Sequence[int] | None = None,
    drawn: Sequence[bool] = (),
    is_video: bool = False,
) -> Encoded:
    """Tokenise one conversation in the LLaVA layout.

    Args:
        turns: `[{"from": "human" | "gpt", "value": text}, ...]`. A first turn from "gpt" is dropped, as published. In
            front of them may be one from "system", which takes the place of the template's system prompt; `plain`
            has none and ignores it.
        template: of conversations, or "plain".
        num_images: images of the row; the text must hold as many `<image>`.
        tiles: of each image, see `tiled_text`; None: images are not cut into tiles.
        drawn: of each image, is it to be drawn? Empty: none is.
        is_video: the images are the frames of one video.

    Raises:
        ConversationError: the conversation does not fit the template; `reason` says how.
        DataError: template "chat_template", and the tokenizer has none.
        ValueError: an unknown template.
    """
    template = template if isinstance(template, Template) else template_of(template, tokenizer)
    checked = checked_turns(turns)
    check_placeholders(checked)
    system, checked = _split_system(checked, template)
    if not template.is_conversation:
        if any(drawn):
            raise ConversationError("draw_template", f"--template {template.name} draws no pictures")
        return _encode_caption(checked, tokenizer, template, num_images, tiles)
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
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in checked)
    if found == 0 and template.adds_images:
        found = num_images
        checked[0] = Turn("human", f"{IMAGE_TOKEN}\n" * num_images + checked[0].text)
    check_image_count(found, num_images)
    placed = place_pictures(checked, template, drawn or (False,) * num_images, is_video)
    if tiles is not None:
        counts = iter(tiles)
        placed = [Turn(turn.role, tiled_text(turn.text, counts)) for turn in placed]
    return encode_marked(
        marked_parts(template, system, placed), tokenizer, template, drawn_placeholders(drawn, tiles)
    )


def drawn_placeholders(drawn: Sequence[bool], tiles: Sequence[int] | None) -> list[bool]:
    """`drawn` of each placeholder: of each image, or of each of its tiles."""
    counts = [1] * len(drawn) if tiles is None else tiles
    return [one for one, count in zip(drawn, counts, strict=False) for _ in range(count)]


def image_labels(drawn: bool, count: int) -> list[int]:
    """Labels of an image's placeholder, and of what follows it by the template: `count` values."""
    return [IMAGE_TOKEN_ID if drawn else IGNORE_INDEX, *[IGNORE_INDEX] * (count - 1)]


def _encode_caption(
    turns: list[Turn],
    tokenizer: TextTokenizer,
    template: Template,
    num_images: int,
    tiles: Sequence[int] | None,
) -> Encoded:
    """Template `plain`, or one that is like it: BOS, the images, the caption and its end, which train. The question is
    not used."""
    if len(turns) != 2:
        raise ConversationError("plain_turns", f"{len(turns)} turns, not a question and a caption")
    question, caption = turns
    if (question.role, caption.role) != ("human", "gpt"):
        raise ConversationError("role_order", f"turns are from {question.role!r}, {caption.role!r}")
    if IMAGE_TOKEN in caption.text:
        raise ConversationError("image_in_caption", f"the caption holds {IMAGE_TOKEN}")
    check_image_count(question.text.count(IMAGE_TOKEN), num_images)
    if num_images == 0:
        raise ConversationError(
            "plain_without_image", "no image to caption; text belongs to another template"
        )
    text = template.clean_caption(caption.text)
    caption_ids: list[int] = []
    if text:
        newline = template.ends_captions == "newline"
        caption_ids = (
            tokenizer.encode(f"{text}\n") if newline else [*tokenizer.encode(text), tokenizer.eos_id]
        )
    image = [IMAGE_TOKEN_ID]
    if tiles is not None:
        image, num_images = [IMAGE_TOKEN_ID, *tokenizer.encode("\n")], sum(tiles)
    head = [*tokenizer.bos, *image * num_images]
    return Encoded(head + caption_ids, [IGNORE_INDEX] * len(head) + caption_ids)


def _split_system(turns: list[Turn], template: Template) -> tuple[str, list[Turn]]:
    """The system prompt of a conversation, and its other turns."""
    if turns[0].role != SYSTEM_ROLE:
        return template.default_system, turns
    if IMAGE_TOKEN in turns[0].text:
        raise ConversationError("image_in_system", f"the system turn holds {IMAGE_TOKEN}")
    if is_blank(turns[0].text):
        return template.default_system if template.blank_system_is_default else "", turns[1:]
    return turns[0].text, turns[1:]


def marked_parts(template: Template, system: str, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """A conversation as (text, whether it trains) pairs.

    A turn without text is only its header and what the template has in place of a text; an empty answer trains nothing.

    Args:
        template: of conversations.
        system: the system prompt, or "".
        turns: of "human" and "gpt", their pictures where they are to be.
    """
    if template.chat is not None:
        return template.chat.parts(system, [(turn.role, turn.text) for turn in turns])
    parts = [(template.system_text(typed(system, template)), False)]
    for turn in turns:
        form = template.answer if turn.role == "gpt" else template.question
        assert form is not None, f"{template.name} is no template of conversations"
        parts.append((form.header, False))
        if turn.text:
            # With what stands in front of it: sentencepiece keeps the space in front of a word in its piece.
            parts.append((f"{form.before}{typed(turn.text, template)}{form.after}", turn.role == "gpt"))
            parts.append((form.behind, False))
        else:
            parts.append((form.empty, False))
    return parts


def typed(text: str, template: Template) -> str:
    """A text that was typed, as the template has it: what could be a control token is marked where it stays text."""
    return mark_typed(text) if template.literal else text


def place_pictures(
    turns: Sequence[Turn], template: Template, drawn: Sequence[bool], is_video: bool
) -> list[Turn]:
    """Turns with their pictures where the template wants them, and with its control tokens around them.

    Args:
        drawn: of each picture, is it to be drawn?
        is_video: the pictures are the frames of one video, which stand together.

    Raises:
        ConversationError: a picture that is to be drawn stands in a question, or the template draws none.
    """
    if is_video and len(drawn) and all(drawn):
        frames = IMAGE_TOKEN * len(drawn)
        turns = [Turn(turn.role, turn.text.replace(frames, IMAGE_TOKEN)) for turn in turns]
        check_image_count(sum(turn.text.count(IMAGE_TOKEN) for turn in turns), 1)
        around, drawn, whole = template.around_drawn_video, (True,), frames
        place = template.place_images
    else:
        around, whole = template.around_drawn, IMAGE_TOKEN
        place = template.place_frames if is_video and template.place_frames else template.place_images
    read = ("", "") if is_video else template.around_image
    each = iter(drawn)

    def surrounded(role: str) -> Callable[[object], str]:
        def one(_: object) -> str:
            if not next(each):
                return f"{read[0]}{IMAGE_TOKEN}{read[1]}"
            if around is None:
                raise ConversationError("draw_template", f"--template {template.name} draws no pictures")
            if role != "gpt":
                raise ConversationError("drawn_in_question", f"it stands in a turn from {role!r}")
            return f"{around[0]}{whole}{around[1]}"

        return one

    return [
        Turn(turn.role, re.sub(re.escape(IMAGE_TOKEN), surrounded(turn.role), place(turn.text)))
        for turn in turns
    ]


def encode_marked(
    parts: Sequence[tuple[str, bool]],
    tokenizer: TextTokenizer,
    template: Template,
    drawn: Sequence[bool] = (),
) -> Encoded:
    """Tokenise (text, whether it trains) pairs as one text; a token trains if its first character does.

    Args:
        drawn: of each placeholder, is its image to be drawn? Empty: none is.
    """
    text = "".join(part for part, _ in parts)
    trains = b"".join((b"\1" if trained else b"\0") * len(part) for part, trained in parts)
    image = [IMAGE_TOKEN_ID, *(tokenizer.encode(template.behind_image) if template.behind_image else ())]
    tokens = list(tokenizer.bos) if template.with_bos else []
    encode: Callable[[str], Iterable[tuple[int, int]]] = (
        partial(encode_marked_text, tokenizer) if template.literal else tokenizer.encode_with_offsets
    )
    labels, start = [IGNORE_INDEX] * len(tokens), 0
    draw = iter(drawn)
    for segment in IMAGE_SPLIT.split(text):
        if segment == IMAGE_TOKEN:
            tokens += image
            labels += image_labels(next(draw, False), len(image))
        else:
            for token, begin in encode(segment):
                tokens.append(token)
                labels.append(token if trains[start + begin] else IGNORE_INDEX)
        start += len(segment)
    return Encoded(tokens, labels)
