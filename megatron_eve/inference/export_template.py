"""The template of the prompts by its name: that of a tokenizer, or of a folder for transformers. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_eve.config import ConfigError
from megatron_eve.data.errors import DataError
from megatron_eve.data.text.literal_text import without_marks
from megatron_eve.data.text.load_tokenizer import TOKENIZER_JSON, load_tokenizer
from megatron_eve.data.text.templates import find_template, template_of
from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.inference.engine import PromptError
from megatron_eve.models.text_format import CHAT_TEMPLATE, Template


def template_of_export(folder: Path, conv_mode: str) -> Template:
    """The template of the prompts of a folder for transformers, whose own chat template is `chat_template`.

    Raises:
        ConfigError: it has none, or one that cannot be asked with.
    """
    if conv_mode != CHAT_TEMPLATE.name:
        return find_template(conv_mode)
    return open_template(conv_mode, load_tokenizer(folder / TOKENIZER_JSON, legacy=True))


def open_template(conv_mode: str, tokenizer: TextTokenizer) -> Template:
    """`template_of` for `--conv-mode`.

    Raises:
        ConfigError: the tokenizer has no chat template, or one that cannot be asked with.
    """
    try:
        return template_of(conv_mode, tokenizer)
    except DataError as error:
        raise ConfigError(f"--conv-mode {conv_mode}: {error}") from None


def unmarked(text: str, template: Template, tokenizer: Any) -> str:
    """A prompt's text as transformers' processor takes it, which finds control tokens wherever they stand.

    Args:
        text: of the template.
        template: of the prompts.
        tokenizer: of transformers.

    Raises:
        PromptError: a control token in it was typed.
    """
    if not template.literal:
        return text
    added = tokenizer.added_tokens_decoder.values()
    plain = without_marks(text, [str(one) for one in added if one.special])
    if plain is None:
        raise PromptError(
            "typed_control_token", "the text holds a control token, which transformers cannot read as text"
        )
    return plain
