"""Templates of conversations in Jinja, for transformers, that several families share. Imports no torch."""

from __future__ import annotations

from megatron_eve.models.text_format import TEXT_OF_MESSAGE, VICUNA_SYSTEM

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
