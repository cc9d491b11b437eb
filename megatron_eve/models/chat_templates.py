"""Templates of conversations in Jinja, for transformers, that several families share. Imports no torch."""

from __future__ import annotations

from megatron_eve.models.text_format import CHATML, TEXT_OF_MESSAGE, VICUNA_SYSTEM

_VICUNA = """\
BEGIN{%- if messages and messages[0].role == 'system' -%}
    {{- text_of(messages[0].content) + ' ' -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- 'SYSTEM_PROMPT ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set text = text_of(message.content) -%}
    {%- if text.count('<image>') == 1 -%}
        {%- set text = ('<image>\\n' + text.replace('<image>', '').strip()).strip() -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- 'USER:' + (' ' + text + ' ' if text else '') -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- if text -%}
            {%- generation -%}
                {{- ' ' + text + 'END' -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('roles are user and assistant, and system in front; not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def vicuna_chat_template(begin: str, end: str) -> str:
    """Vicuna's conversations (`text_format.VICUNA_V1`): a message's only image goes to its front, several stay.

    `generation` in it marks what the labels of training are: an answer, and the control token behind it.

    Args:
        begin: control token in front of the text; "" for none.
        end: control token behind each answer.
    """
    text = _VICUNA.replace("BEGIN", f"{{{{- '{begin}' -}}}}\n" if begin else "").replace("END", end)
    return TEXT_OF_MESSAGE + text.replace("SYSTEM_PROMPT", VICUNA_SYSTEM.replace("'", "\\'"))


_CHATML = """\
{%- if messages and messages[0].role == 'system' -%}
    {%- if text_of(messages[0].content) | trim -%}
        {{- '<|im_start|>system\\n' + text_of(messages[0].content) + '<|im_end|>\\n' -}}
    {%- endif -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- '<|im_start|>system\\nSYSTEM_PROMPT<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ('user', 'assistant') -%}
        {{- raise_exception('roles are user and assistant, and system in front; not ' + message.role) -}}
    {%- endif -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and text_of(message.content) -%}
        {%- generation -%}
            {{- text_of(message.content) + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- text_of(message.content) + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
CHATML_CHAT_TEMPLATE = TEXT_OF_MESSAGE + _CHATML.replace("SYSTEM_PROMPT", CHATML.default_system)
"""`text_format.CHATML` of a tokenizer without BOS."""

_WITH_PICTURES = (
    TEXT_OF_MESSAGE
    + """\
{%- set told = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content -%}
        {%- set message = dict(message, content=text_of(message.content)) -%}
    {%- endif -%}
    {%- set told.messages = told.messages + [message] -%}
{%- endfor -%}
{%- set messages = told.messages -%}
"""
)


def chat_template_with_pictures(source: str) -> str:
    """The chat template of a language model, for messages that have pictures: it gets their texts, with `<image>`."""
    return _WITH_PICTURES + source


def is_with_pictures(source: str) -> bool:
    """Was a chat template made by `chat_template_with_pictures`?"""
    return source.startswith(_WITH_PICTURES)
