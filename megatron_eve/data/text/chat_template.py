"""A tokenizer's own chat template (`--template chat_template`): its texts, and which of their characters train.

transformers renders it (Jinja, in a sandbox), so that texts and ids are those of `apply_chat_template`. The template is
not evaluated on today's date: it gets a fixed one, so that the same rows make the same dataset on any day.

What trains is an answer and the control token that ends it. A template says so by `{% generation %}` blocks. Of one
without them an answer begins where the prompt for it ends (the messages before it, with `add_generation_prompt`) and
ends behind the control token that follows its text. Both are looked for in the whole conversation as it is rendered:
where earlier answers are written otherwise than the last (Qwen3 leaves out what they thought), each trains as it is
written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_eve.data.errors import DataError
from megatron_eve.data.text.json_tokenizer import JsonTokenizer
from megatron_eve.data.text.literal_text import mark_typed
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.data.text.turns import ConversationError
from megatron_eve.models.text_format import CHAT_TEMPLATE, IMAGE_TOKEN, Part, Template

FIXED_DATE = "26 Jul 2024"
"""What a template gets for today's date; Llama 3.1's own default."""
DATE_MACRO = f"{{% macro strftime_now(format) %}}{FIXED_DATE}{{% endmacro +%}}"
"""In front of a chat template: it gets the fixed date."""

_ROLES = {"human": "user", "gpt": "assistant"}
_END = "\ufdd1"  # behind the text of an answer, to find where it ends; kept free by Unicode, as `literal_text.MARK`
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [
    ("human", f"{IMAGE_TOKEN}\nWhat is it?"),
    ("gpt", "A cat."),
    ("human", "And that?"),
    ("gpt", "A dog."),
]


def read_chat_template(tokenizer_file: str | Path) -> tuple[Path, str] | None:
    """The chat template beside a tokenizer.json: the file that it is in, and its text; None where there is none.

    As transformers: chat_template.jinja, else `chat_template` of tokenizer_config.json, of several the one that is
    called "default".
    """
    folder = Path(tokenizer_file).parent
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path, path.read_text(encoding="utf-8")
        path = folder / "tokenizer_config.json"
        found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return (path, found) if isinstance(found, str) else None


def chat_template_sha256(tokenizer_file: str | Path) -> str:
    """Digest of the chat template beside a tokenizer.json, in hexadecimal digits; "" where there is none."""
    found = read_chat_template(tokenizer_file)
    return hashlib.sha256(found[1].encode()).hexdigest() if found else ""


def own_template(tokenizer: TextTokenizer) -> Template:
    """The template `chat_template` of a tokenizer.

    Raises:
        DataError: it is no tokenizer.json, has no chat template, or one that cannot be trained on.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        raise DataError(
            f"the template {CHAT_TEMPLATE.name} is that of a tokenizer.json, and {tokenizer.path} is a "
            "tokenizer.model: name the tokenizer.json of the model, or another template"
        )
    found = read_chat_template(tokenizer.path)
    if found is None:
        raise DataError(
            f"{Path(tokenizer.path).parent} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): copy it from the folder of the language model, or name another template"
        )
    chat = ChatTemplate(*found, tokenizer)
    return replace(CHAT_TEMPLATE, chat=chat, with_bos=chat.with_bos, stop=chat.stop)


class ChatTemplate:
    """A chat template in Jinja; a `ChatWriter`.

    Args:
        path: the file that it is in, for messages.
        source: its text.
        tokenizer: that it belongs to.

    Attributes:
        with_bos: its texts begin with the tokenizer's BOS token. What it writes here lacks that.
        stop: the control token that ends an answer.

    Raises:
        DataError: it raises on a conversation of two questions, or does not say what of it trains.
    """

    def __init__(self, path: Path, source: str, tokenizer: JsonTokenizer) -> None:
        self._source = DATE_MACRO + source
        self._control = tuple(token for token in tokenizer.control_tokens if token != IMAGE_TOKEN)
        self._names = _special_tokens(Path(tokenizer.path).parent)
        bos_id = tokenizer.bos_id
        self._bos = "" if bos_id is None else tokenizer.token_bytes(bos_id).decode()
        self._generation = bool(_GENERATION.search(source))
        longest = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._header = re.compile("|".join(longest) or "(?!)")
        self._ends = re.compile(rf"\s*({self._header.pattern})")
        self.with_bos = False
        self.stop: tuple[str, ...] = ()
        try:
            self._probe()
        except ConversationError as error:
            raise DataError(
                f"the chat template of {path} {error.detail}: correct it, or name another template"
            ) from None

    def _probe(self) -> None:
        """Write a conversation, and look at what trains of it.

        Raises:
            ConversationError: this cannot be trained on.
        """
        text, _ = self._render(self._messages("", _PROBE), first=True)
        self.with_bos = bool(self._bos) and text.startswith(self._bos)
        parts = self.parts("", _PROBE)
        trained = [text for text, trains in parts if trains]
        answers = [text for role, text in _PROBE if role == "gpt"]
        if len(trained) != 2 or any(
            answer not in text for answer, text in zip(answers, trained, strict=True)
        ):
            raise ConversationError(
                "chat_template", f"marks {trained} to train where the answers are {answers}"
            )
        ends = [
            self._ends.match(text.partition(answer)[2]) for answer, text in zip(answers, trained, strict=True)
        ]
        if ends[0] is None or ends[1] is None:
            raise ConversationError(
                "chat_template", "ends answers with no control token, by which a model could stop"
            )
        self.stop = tuple(dict.fromkeys((ends[0][1], ends[1][1])))
        prompt, (asked, _) = self.prompt("", _PROBE[:1]), self._render(self._messages("", _PROBE[:1]))
        if prompt == asked and self._header.search(trained[0].partition(answers[0])[0]):
            raise ConversationError(
                "chat_template",
                "does not heed add_generation_prompt, so no prompt ends in the header of an answer",
            )

    def parts(self, system: str, turns: Sequence[tuple[str, str]]) -> list[Part]:
        """See `ChatWriter.parts`.

        Raises:
            ConversationError: the template raises, or what trains cannot be told.
        """
        messages = self._messages(system, turns)
        text, blocks = self._render(messages)
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        spans = (
            self._blocks(blocks, messages, answers)
            if self._generation
            else self._spans(text, messages, answers)
        )
        self._check_images(text, messages)
        parts: list[Part] = []
        done = 0
        for begin, end in spans:
            parts += [(text[done:begin], False), (text[begin:end], True)]
            done = end
        return [*parts, (text[done:], False)]

    def prompt(self, system: str, turns: Sequence[tuple[str, str]]) -> str:
        """See `ChatWriter.prompt`.

        Raises:
            ConversationError: the template raises.
        """
        messages = self._messages(system, turns)
        text, _ = self._render(messages, add_generation_prompt=True)
        self._check_images(text, messages)
        return text

    def _messages(self, system: str, turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        """Turns as transformers has them, what could be a control token in them marked."""
        said = [("system", system), *turns] if system else turns
        if any(_END in text for _, text in said):
            raise ConversationError("chat_template", "cannot be used on a text with the character U+FDD1")
        return [
            {"role": _ROLES.get(role, role), "content": mark_typed(text, self._control)}
            for role, text in said
        ]

    def _render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, first: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, without the BOS token that begins all texts of the template, and its generation blocks.

        Args:
            first: it is not known yet whether texts begin with BOS; the text is whole.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, blocks = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self._source,
                return_assistant_tokens_mask=self._generation,
                add_generation_prompt=add_generation_prompt,
                **self._names,
            )
        except Exception as error:  # a template is a program, which may raise anything
            reason = " ".join(str(error).split())[:200]
            raise ConversationError("chat_template", f"raises {type(error).__name__}: {reason}") from None
        text, found = texts[0], [(int(begin), int(end)) for begin, end in (blocks[0] if blocks else ())]
        if first:
            return text, found
        if self.with_bos and not text.startswith(self._bos):
            raise ConversationError("chat_template", f"begins some texts with {self._bos}, and others not")
        skipped = len(self._bos) if self.with_bos else 0
        return text[skipped:], [(begin - skipped, end - skipped) for begin, end in found]

    def _blocks(
        self, blocks: list[tuple[int, int]], messages: Sequence[Mapping[str, str]], answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        """The generation blocks, but for those of empty answers, which train nothing."""
        if len(blocks) != len(answers):
            return blocks
        return [block for block, at in zip(blocks, answers, strict=True) if messages[at]["content"]]

    def _spans(
        self, text: str, messages: Sequence[Mapping[str, str]], answers: Sequence[int]
    ) -> list[tuple[int, int]]:
        """First and last place of what trains, of a template without generation blocks; see the top of the file."""
        answers = [at for at in answers if messages[at]["content"].strip()]
        ended = [dict(message) for message in messages]
        for at in answers:
            content = ended[at]["content"]
            last = len(content.rstrip())
            ended[at]["content"] = f"{content[:last]}{_END}{content[last:]}"
        with_ends, _ = self._render(ended)
        pieces = with_ends.split(_END)
        if "".join(pieces) != text or len(pieces) != len(answers) + 1:
            raise ConversationError("chat_template", "does not write each answer once, as it is")
        spans: list[tuple[int, int]] = []
        place = 0
        for at, piece in zip(answers, pieces, strict=False):
            prompt, _ = self._render(messages[:at], add_generation_prompt=True)
            begin, place = len(prompt), place + len(piece)
            if not text.startswith(prompt) or not (spans[-1][1] if spans else 0) <= begin <= place:
                raise ConversationError(
                    "chat_template",
                    "writes the prompt for an answer otherwise than it writes the conversation",
                )
            end = self._ends.match(text, place)
            if end is None:
                raise ConversationError(
                    "chat_template", "ends answers with no control token, by which a model could stop"
                )
            spans.append((begin, end.end()))
        return spans

    def _check_images(self, text: str, messages: Sequence[Mapping[str, str]]) -> None:
        wanted = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
        if text.count(IMAGE_TOKEN) != wanted:
            found = text.count(IMAGE_TOKEN)
            raise ConversationError(
                "chat_template", f"writes {found} {IMAGE_TOKEN} where the conversation has {wanted}"
            )


def _special_tokens(folder: Path) -> dict[str, str]:
    """Names of control tokens that a template may use, such as `eos_token`, and the tokens."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    found = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found
