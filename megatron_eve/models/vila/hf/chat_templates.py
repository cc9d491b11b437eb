"""VILA's templates of conversations (`models/vila/templates.py`) in Jinja, for transformers.

They give the texts of training: pictures of a turn in front of it (VILA 1.0), or in their places. `generation` marks
what the labels of training are. Where the text begins with the BOS token, tokenizers add none to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_eve.models.text_format import TEXT_OF_MESSAGE, VICUNA_SYSTEM

_IMAGES_FIRST = """\
{%- macro placed(text) -%}
    {%- set count = text.count('<image>') -%}
    {%- if count -%}
        {{- '<image>\\n' * (count - 1) + ('<image>\\n' + text.replace('<image>', '').strip()).strip() -}}
    {%- else -%}
        {{- text -}}
    {%- endif -%}
{%- endmacro -%}
"""
_IMAGES_IN_PLACE = """\
{%- macro placed(text) -%}
    {%- if '<image>' in text -%}
        {%- set ns = namespace(text='') -%}
        {%- for part in text.split('<image>') -%}
            {%- set ns.text = ns.text + part.strip() + ('' if loop.last else ' <image>\\n') -%}
        {%- endfor -%}
        {{- ns.text.strip() -}}
    {%- else -%}
        {{- text -}}
    {%- endif -%}
{%- endmacro -%}
"""
_NEWLINE_BEHIND = """\
{%- macro placed(text) -%}
    {{- text.strip().replace('<image>', '<image>\\n') -}}
{%- endmacro -%}
"""
# SYSTEM and DEFAULT are a system prompt that is given, as Jinja, and that of the template.
_CONVERSATION = """\
{%- if messages and messages[0].role == 'system' -%}
    {%- set system = text_of(messages[0].content) -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = DEFAULT -%}
{%- endif -%}
{{- SYSTEM -}}
{%- for message in messages -%}
    {%- set text = placed(text_of(message.content)) -%}
    {%- if message.role == 'user' -%}
        {{- QUESTION -}}
    {%- elif message.role == 'assistant' -%}
        {{- HEADER -}}
        {%- if text -%}
            {%- generation -%}
                {{- ANSWER -}}
            {%- endgeneration -%}
        {%- endif -%}
        {{- BEHIND -}}
    {%- else -%}
        {{- raise_exception('roles are user and assistant, and system in front; not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- HEADER -}}
{%- endif -%}
"""


def _filled(placing: str, **parts: str) -> str:
    text = _CONVERSATION
    for name, value in parts.items():
        text = text.replace(name, value)
    return TEXT_OF_MESSAGE + placing + text


_VICUNA = {
    "DEFAULT": "'" + VICUNA_SYSTEM.replace("'", "\\'") + "'",
    "SYSTEM": "'<s>' + system + ' '",
    "QUESTION": "'USER:' + (' ' + text + ' ' if text else '')",
    "HEADER": "'ASSISTANT:'",
    "ANSWER": "' ' + text + '</s>'",
    "BEHIND": "''",
}
_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_3 = {
    "DEFAULT": f"'{_LLAMA_3_SYSTEM}'",
    "SYSTEM": "'<|begin_of_text|>' + ('<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|end_of_text|>' "
    "if system else '')",
    "QUESTION": "'<|start_header_id|>user<|end_header_id|>\\n\\n' + (text + '<|end_of_text|>' if text else '')",
    "HEADER": "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    "ANSWER": "text + '<|end_of_text|>'",
    "BEHIND": "''",
}
_QWEN2 = {
    "DEFAULT": "'You are a helpful assistant'",
    "SYSTEM": "'<|im_start|>system\\n' + system + '<|im_end|>\\n'",
    "QUESTION": "'<|im_start|>user\\n' + text + '<|im_end|>\\n'",
    "HEADER": "'<|im_start|>assistant\\n'",
    "ANSWER": "text + '<|im_end|>'",
    "BEHIND": "'\\n' if text else '<|im_end|>\\n'",
}

CHAT_TEMPLATES: Mapping[str, str] = {
    "vila_v1": _filled(_IMAGES_FIRST, **_VICUNA),
    "vila15_v1": _filled(_IMAGES_IN_PLACE, **_VICUNA),
    "llama_3": _filled(_IMAGES_IN_PLACE, **_LLAMA_3),
    "qwen2": _filled(_NEWLINE_BEHIND, **_QWEN2),
}
