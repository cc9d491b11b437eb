"""The template of the prompts of a model, checked against its tokenizer before the model opens. Imports no torch."""

from __future__ import annotations

import argparse

from megatron_eve.config import ConfigError
from megatron_eve.data.text.load_tokenizer import load_kind
from megatron_eve.data.text.templates import prompt_templates, unfit_tokenizer
from megatron_eve.inference.checkpoint_model import read_saved
from megatron_eve.inference.export_template import open_template, template_of_export
from megatron_eve.inference.opening import is_exported
from megatron_eve.models.text_format import CHAT_TEMPLATE, Template


def check_conv_mode(flags: argparse.Namespace, conv_mode: str) -> Template:
    """Refuse a template that does not fit the tokenizer; returns the template, which may be the tokenizer's own.

    Args:
        flags: of `add_model_flags`, checked; a folder for transformers has a tokenizer of its own.
        conv_mode: the template of the prompts.

    Raises:
        ConfigError: the tokenizer lacks a control token of it, or has no chat template, or another one than the model
            was trained with; naming the remedy.
    """
    if is_exported(flags.model_path):
        return template_of_export(flags.model_path, conv_mode)
    from megatron_eve.checkpoint.tokenizer_record import tokenizer_kind

    saved = read_saved(flags.model_path)
    tokenizer = load_kind(flags.tokenizer_model, tokenizer_kind(saved))
    if unfit := unfit_tokenizer(conv_mode, tokenizer):
        raise ConfigError(
            f"--conv-mode {conv_mode}: {unfit}; name the template that the model was trained with, one of "
            f"{', '.join(prompt_templates())}"
        )
    if conv_mode == CHAT_TEMPLATE.name:
        from megatron_eve.data.text.chat_template import chat_template_sha256

        known = (saved.get("dataset") or {}).get("chat_templates", ())
        found = chat_template_sha256(tokenizer.path)
        if known and found and found not in known:
            raise ConfigError(
                f"--conv-mode {conv_mode}: the chat template beside {tokenizer.path} (sha256 {found[:12]}...) is "
                f"another one than the one that {flags.model_path} was trained with (sha256 {known[0][:12]}...); name "
                "the tokenizer's folder as it was for the data"
            )
    return open_template(conv_mode, tokenizer)
