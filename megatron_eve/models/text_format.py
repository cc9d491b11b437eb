"""How rows of text become tokens: templates as data, and what a model family says of its texts. Imports no torch.

All families share the templates here, and a family may add its own (`TextRules`). `data/text/templates.py` finds them
by name. Labels come from the character range of each answer (`data/text/conversation.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

IMAGE_TOKEN = "<image>"
"""Marks the position of a picture in a text."""

_CONTROL = re.compile(r"</?s>|<\|\w+\|>")


class RoleFormat(NamedTuple):
    """How a turn of one role is written: `header`, `before`, the text, `after`, `behind`.

    Of an answer its text trains, with what stands right `before` and `after` it.

    Attributes:
        header: names the role.
        before, after: beside the text.
        behind: after that; does not train.
        empty: in place of all that follows the header, where a turn has no text.
    """

    header: str
    before: str = ""
    after: str = ""
    behind: str = ""
    empty: str = ""


Part = tuple[str, bool]
"""A piece of a sample's text, and whether it trains."""


class ChatWriter(Protocol):
    """Writes conversations where no `RoleFormat` can; turns are (role, text), of "human" and "gpt"."""

    def parts(self, system: str, turns: Sequence[tuple[str, str]]) -> list[Part]:
        """A whole conversation, without the BOS token; a system prompt of "" is none."""

    def prompt(self, system: str, turns: Sequence[tuple[str, str]]) -> str:
        """The text to generate from, without the BOS token, of turns the last of which is a question."""


def as_written(text: str) -> str:
    """A turn as it is, with its pictures where they are."""
    return text


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a row becomes text, as data. A control token that is written in the text becomes its id.

    Attributes:
        name: for `--template` and `--conv-mode`.
        kinds: of the rows that it takes (`data/schema.py`).
        what: what it is for, for `--help`.
        samples: what its samples are, where they teach no conversation, such as "captions"; "" for conversations.
        question, answer: how turns are written. None: the template is no conversation, or has `chat`.
        chat: writes conversations in place of them; a chat template of transformers.
        with_bos: the tokenizer's BOS token, where it has one, begins every text.
        system: text in front of the first turn, with `{system}` in it.
        no_system: the same where the system prompt is empty.
        default_system: the system prompt of a row without a system turn.
        blank_system_is_default: a row whose system turn is blank has the default one, else none.
        place_images: a turn's text -> the same with its pictures where the template wants them.
        place_in_prompt: the same for a question that a model is asked.
        adds_images: pictures of a row whose text names none stand in front of its first question. Otherwise such a row
            is left out, as one that has lost its `<image>`.
        behind_image: text that follows each picture and does not train.
        stop: control tokens that end an answer, beside the tokenizer's EOS.
        prompts: a model can be asked with it.
        around_image: control tokens in front of a picture that is read and behind it; not in prompts, and not around
            frames of a video.
        around_drawn: the same of a picture that is to be drawn. None: samples of the template draw none.
        around_drawn_video: the same of all frames of a video that is to be drawn.
        place_frames: a turn's text with all frames of a video that is read; None: `place_images`.
        blank_prompt: what a picture without a caption is to be drawn from.
        clean_caption: a caption -> the same as the tokenizer is to read it, of a template without `question`.
        literal: control tokens in the text of turns stay text (`data/text/literal_text.py`); the published code of the
            other templates takes them for control tokens.
        ends_captions: what trains behind such a caption: a newline, or the tokenizer's EOS.
    """

    name: str
    kinds: tuple[str, ...]
    what: str
    samples: str = ""
    question: RoleFormat | None = None
    answer: RoleFormat | None = None
    chat: ChatWriter | None = None
    with_bos: bool = True
    system: str = ""
    no_system: str = ""
    default_system: str = ""
    blank_system_is_default: bool = False
    place_images: Callable[[str], str] = as_written
    place_in_prompt: Callable[[str], str] = as_written
    adds_images: bool = False
    behind_image: str = ""
    stop: tuple[str, ...] = ()
    prompts: bool = True
    around_image: tuple[str, str] = ("", "")
    around_drawn: tuple[str, str] | None = None
    around_drawn_video: tuple[str, str] | None = None
    place_frames: Callable[[str], str] | None = None
    blank_prompt: str = ""
    clean_caption: Callable[[str], str] = as_written
    literal: bool = False
    ends_captions: Literal["newline", "eos"] = "newline"

    @property
    def is_conversation(self) -> bool:
        """Are its samples questions and answers?"""
        return self.question is not None or self.chat is not None

    @property
    def is_document(self) -> bool:
        """Are its samples whole texts, with or without pictures in them?"""
        return "interleaved" in self.kinds

    def system_text(self, system: str) -> str:
        """What stands in front of the first turn."""
        return self.system.replace("{system}", system) if system else self.no_system

    def control_tokens(self) -> Iterator[str]:
        """Control tokens that its texts hold, each of which a tokenizer must have as one token."""
        parts = [self.system, self.no_system, *(self.question or ()), *(self.answer or ())]
        found = [token for part in parts for token in _CONTROL.findall(part)]
        around = [*self.around_image, *(self.around_drawn or ()), *(self.around_drawn_video or ())]
        yield from dict.fromkeys([*found, *filter(None, around)])


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def only_image_first(text: str) -> str:
    """The only picture of a turn in front of it, as published; several stay where they are."""
    if text.count(IMAGE_TOKEN) != 1:
        return text
    return f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()


def images_in_place(text: str) -> str:
    """Pictures where they are: a space before and a newline after each, and no other white space beside them."""
    if IMAGE_TOKEN not in text:
        return text
    *before, last = (part.strip() for part in text.split(IMAGE_TOKEN))
    return f"{IMAGE_TOKEN}\n".join([*(f"{part} " for part in before), last]).strip()


PLAIN = Template(
    name="plain",
    kinds=("conversation", "pair"),
    what="pictures and their caption, which trains with a newline behind it",
    samples="captions",
    stop=("\n",),
)
VICUNA_V1 = Template(
    name="vicuna_v1",
    kinds=("conversation",),
    what='a conversation, "SYSTEM USER: question ASSISTANT: answer</s>USER: ...", whose answers and </s> train',
    question=RoleFormat("USER:", before=" ", after=" "),
    answer=RoleFormat("ASSISTANT:", before=" ", after="</s>"),
    system="{system} ",
    no_system=" ",
    default_system=VICUNA_SYSTEM,
    blank_system_is_default=True,
    place_images=only_image_first,
    stop=("</s>",),
)
CHATML = Template(
    name="chatml",
    kinds=("conversation",),
    what="a conversation in ChatML, <|im_start|>user, a newline, the question<|im_end|> and so on (Qwen2.5); control "
    "tokens that are typed stay text",
    question=RoleFormat("<|im_start|>user\n", after="<|im_end|>", behind="\n", empty="<|im_end|>\n"),
    answer=RoleFormat("<|im_start|>assistant\n", after="<|im_end|>", behind="\n", empty="<|im_end|>\n"),
    system="<|im_start|>system\n{system}<|im_end|>\n",
    default_system="You are a helpful assistant.",
    stop=("<|im_end|>", "<|endoftext|>"),
    literal=True,
)
CHAT_TEMPLATE = Template(
    name="chat_template",
    kinds=("conversation",),
    what="a conversation in the chat template of the tokenizer's folder (chat_template.jinja, or chat_template in "
    "tokenizer_config.json), as transformers writes it; control tokens that are typed stay text",
    literal=True,
)
"""The one of a tokenizer has `chat`, `with_bos` and `stop` besides (`data/text/templates.py`, `template_of`)."""
DOCUMENT = Template(
    name="document",
    kinds=("interleaved", "pair", "text"),
    what="a text, all of which trains with the EOS token behind it, with or without pictures in it",
    samples="documents",
    prompts=False,
)


@dataclass(frozen=True)
class TextRules:
    """What a model family says of the texts that it is trained on.

    Attributes:
        templates: of its own, by name.
        tokenizer_legacy: how a sentencepiece tokenizer.model is read unless `--tokenizer-legacy` says otherwise; see
            `data/text/tokenizer.py`.
        added_tokens: control tokens behind the tokenizer's own, for tokenizers that lack them; in this order.
        length_counts_rows: `--model-max-length` counts the rows of a picture, and one that does not fit whole is
            dropped with all that follows. Otherwise a picture counts as one.
    """

    templates: Mapping[str, Template] = field(default_factory=dict)
    tokenizer_legacy: bool = True
    added_tokens: tuple[str, ...] = ()
    length_counts_rows: bool = False


TEXT_OF_MESSAGE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- '<image>\\n' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""
"""For chat templates of transformers: `text_of(content)`, a message's text with `<image>` for each of its pictures."""
