"""The templates of datasets and prompts, by name: those that all families share, and those of each family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from megatron_eve.data.text.text_tokenizer import TextTokenizer
from megatron_eve.models.registry import loaded_families, tower_families
from megatron_eve.models.text_format import (
    CHAT_TEMPLATE,
    CHATML,
    DOCUMENT,
    PLAIN,
    VICUNA_V1,
    Template,
)

_SHARED = {template.name: template for template in (PLAIN, VICUNA_V1, DOCUMENT, CHATML, CHAT_TEMPLATE)}


def templates() -> dict[str, Template]:
    """All templates by name: the shared ones, then those of each family."""
    every = (*loaded_families(), *tower_families())
    own = {name: one for family in every for name, one in family.text_rules.templates.items()}
    return {**_SHARED, **own}


@cache
def find_template(name: str) -> Template:
    """The template of this name.

    Raises:
        ValueError: there is none.
    """
    found = templates().get(name)
    if found is None:
        raise ValueError(f"unknown template {name!r}: use one of {', '.join(templates())}")
    return found


def template_of(name: str, tokenizer: TextTokenizer) -> Template:
    """The template of this name for a tokenizer: `chat_template` is the tokenizer's own.

    Raises:
        DataError: the tokenizer has none, or one that cannot be trained on.
        ValueError: there is no such template.
    """
    if name != CHAT_TEMPLATE.name:
        return find_template(name)
    from megatron_eve.data.text.chat_template import own_template  # with transformers, which takes a second

    return own_template(tokenizer)


def unfit_tokenizer(name: str, tokenizer: TextTokenizer) -> str | None:
    """Why a template cannot be used with a tokenizer, in words behind its name; None if it can.

    Raises:
        ValueError: there is no such template.
    """
    if (token := missing_control_token(name, tokenizer.encode)) is not None:
        return f"it has the control token {token}, which {tokenizer.path} lacks"
    template = find_template(name)
    if template.literal:
        for token in template.control_tokens():
            if token not in tokenizer.control_tokens:
                return (
                    f"it tells the control token {token} from the same characters in a question, which needs a "
                    f"tokenizer.json that calls it special, and {tokenizer.path} is none"
                )
    return None


def missing_control_token(template: str, encode: Callable[[str], list[int]]) -> str | None:
    """A control token of a template that a tokenizer does not have as one token; None if it has all.

    Args:
        template: name of it.
        encode: text -> token ids, without BOS.

    Raises:
        ValueError: there is no such template.
    """
    return next((text for text in find_template(template).control_tokens() if len(encode(text)) != 1), None)


def prompt_templates() -> tuple[str, ...]:
    """Templates that can build a prompt for generation."""
    return tuple(name for name, template in templates().items() if template.prompts)


def without_conversation(name: str) -> str:
    """What the samples of a template are, if they teach no conversation, such as "captions"; "" for conversations.

    A template that is not known (of a family that is not installed) counts as one of conversations.
    """
    found = templates().get(name)
    return found.samples if found else ""
