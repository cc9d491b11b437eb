"""Prompts for generation: their text, their token ids, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_eve.data.text.conversation import encode_marked, marked_parts
from megatron_eve.data.text.templates import find_template, prompt_templates
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import SYSTEM_ROLE, ConversationError, Turn, check_image_count, is_blank
from megatron_eve.models.text_format import CHAT_TEMPLATE, IMAGE_TOKEN, Template


def prompt_text(
    question: str,
    template: str | Template,
    num_images: int,
    earlier: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> str:
    """The text to generate from, with an `<image>` for each picture.

    `plain` returns the image placeholders and ignores the question. Other prompts end in the header of an answer,
    such as "ASSISTANT:". Placeholders go in front of the first question, each with a newline, unless the questions
    already hold them; there they stay in their places.

    Args:
        earlier: the questions before this one, each with its answer.
        system: in place of the template's system prompt.

    Raises:
        ConversationError: the questions hold another number of `<image>` than there are images, or an answer holds one.
        ValueError: an unknown template, or one that no prompt fits.
    """
    template = _prompt_template(template)
    if not template.is_conversation:
        return IMAGE_TOKEN * num_images
    if any(IMAGE_TOKEN in answer for _, answer in earlier):
        raise ConversationError("image_in_answer", f"an earlier answer holds {IMAGE_TOKEN}")
    turns: list[Turn] = []
    for asked, answer in earlier:
        turns += Turn("human", asked), Turn("gpt", "" if is_blank(answer) else answer)
    turns.append(Turn("human", question))
    turns = place_images(turns, num_images)
    turns = [Turn(turn.role, template.place_in_prompt(turn.text)) for turn in turns]
    system = template.default_system if system is None else system
    if template.chat is not None:
        return template.chat.prompt(system, [(turn.role, turn.text) for turn in turns])
    assert template.answer is not None, "it has a format of answers, or writes them itself"
    parts = marked_parts(template, system, turns)
    return "".join(part for part, _ in parts) + template.answer.header


def place_images(turns: Sequence[Turn], num_images: int) -> list[Turn]:
    """Turns, the first of them a question, with an `<image>` for each picture: where they hold it, or else in front of
    the first question, each with a newline.

    Raises:
        ConversationError: they hold another number of `<image>` than there are images.
    """
    first, *others = turns
    found = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if found == 0:
        found, first = num_images, Turn(first.role, f"{IMAGE_TOKEN}\n" * num_images + first.text)
    check_image_count(found, num_images)
    return [first, *others]


def split_turns(turns: Sequence[Turn]) -> tuple[str | None, list[Turn]]:
    """The system text of a prompt's turns, if they begin with one, and questions and answers, a question last.

    Raises:
        ConversationError: other turns than these, or an `<image>` that stands in no question.
    """
    system, talk = None, list(turns)
    if talk and talk[0].role == SYSTEM_ROLE:
        system = talk.pop(0).text
    if len(talk) % 2 == 0 or any(turn.role != ("human", "gpt")[at % 2] for at, turn in enumerate(talk)):
        raise ConversationError(
            "unknown_role", "a prompt is a system text or none, then human and gpt in turn, human last"
        )
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role != "human"):
        raise ConversationError(
            "image_in_answer", f"an earlier answer or the system text holds {IMAGE_TOKEN}"
        )
    return system, talk


def prompt_from_turns(turns: Sequence[Turn], template: str | Template, num_images: int) -> str:
    """`prompt_text` of turns: a system text or none, then questions and answers in turn, a question last.

    Raises:
        ConversationError: other turns than these, or another number of `<image>` than of pictures.
        ValueError: an unknown template, or one that no prompt fits.
    """
    system, talk = split_turns(turns)
    pairs = zip(talk[:-1:2], talk[1::2], strict=True)
    earlier = [(asked.text, answer.text) for asked, answer in pairs]
    return prompt_text(talk[-1].text, template, num_images, earlier, system)


def drawing_prompt(
    question: str, template: str | Template, *, video: bool = False, system: str | None = None
) -> str:
    """The text from which a model draws a picture, or a video: a prompt with what announces one behind it.

    Args:
        question: what is to be drawn; "" for the unconditional prompt of guidance.
        template: one that draws.
        video: a video.
        system: in place of the template's system prompt.

    Raises:
        ConversationError: the question holds `<image>`.
        ValueError: an unknown template, or one that draws none.
    """
    if template == CHAT_TEMPLATE.name:
        raise ValueError(f"template {template!r} draws no {'videos' if video else 'pictures'}")
    template = _prompt_template(template)
    around = template.around_drawn_video if video else template.around_drawn
    if around is None or template.answer is None:
        raise ValueError(f"template {template.name!r} draws no {'videos' if video else 'pictures'}")
    return f"{prompt_text(question, template, 0, system=system)}{template.answer.before}{around[0]}"


def encode_text(text: str, tokenizer: TextTokenizer, template: str | Template) -> list[int]:
    """Token ids of a prompt's text, BOS in front, each `<image>` as IMAGE_TOKEN_ID.

    Raises:
        ValueError: an unknown template, or one that no prompt fits.
    """
    return encode_marked([(text, False)], tokenizer, _prompt_template(template)).tokens


def encode_prompt(
    question: str,
    tokenizer: TextTokenizer,
    template: str | Template,
    num_images: int,
    earlier: Sequence[tuple[str, str]] = (),
    system: str | None = None,
) -> list[int]:
    """Token ids to generate from: `prompt_text`, encoded. Raises as that does."""
    text = prompt_text(question, template, num_images, earlier, system)
    return encode_text(text, tokenizer, template)


def stop_ids(tokenizer: TextTokenizer, template: str | Template) -> set[int]:
    """Tokens that end an answer: EOS, and those of the template."""
    return {tokenizer.eos_id, *stop_tokens(tokenizer.encode, template)}


def stop_tokens(encode: Callable[[str], list[int]], template: str | Template) -> set[int]:
    """Tokens of a template that end an answer, of those that the tokenizer has as one token.

    A caption of `plain` ends with its newline: the stages that train on captions train no EOS.

    Args:
        encode: text -> token ids, without BOS.
        template: that a model can be asked with.
    """
    ids = set()
    for text in _prompt_template(template).stop:
        *before, last = encode(text)
        if not before or text == "\n":  # a newline may have a "▁" in front
            ids.add(last)
    return ids


def _prompt_template(template: str | Template) -> Template:
    if isinstance(template, Template):
        return template
    try:
        found = find_template(template)
    except ValueError:
        found = None
    if found is CHAT_TEMPLATE:
        raise ValueError(f"template {template!r} belongs to a tokenizer: see template_of")
    if found is None or not found.prompts:
        raise ValueError(f"unknown template {template!r}: use one of {', '.join(prompt_templates())}")
    return found
