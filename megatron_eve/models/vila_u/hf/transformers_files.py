"""What stands beside the weights in the folder of a VILA-U for transformers. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.hf_format import JSONFiles
from megatron_eve.models.language_config import language_config
from megatron_eve.models.text_format import TEXT_OF_MESSAGE, VICUNA_SYSTEM
from megatron_eve.models.vila_u.config import VILAUConfig
from megatron_eve.models.vila_u.hf.published import depth_config, tower_of
from megatron_eve.models.vila_u.hf.tower_folder import TOWER_CODE, image_processor_config, tower_config

_CODE = (
    "configuration_vila_u.py",
    "modeling_vila_u.py",
    "modeling_vila_u_depth.py",
    "processing_vila_u.py",
    *TOWER_CODE,
)
_PROCESSOR = {"AutoProcessor": "processing_vila_u.VILAUProcessor"}
# Without a length of its own, transformers ends an answer after 20 tokens. As tools/chat.py does.
_GENERATION = {"do_sample": False, "max_new_tokens": 256}

# The template v1 of training (`templates.py`): pictures in their places; a blank question is the unconditional one.
CHAT_TEMPLATE = (
    TEXT_OF_MESSAGE
    + """\
{{- '<s>' -}}
{%- if messages and messages[0].role == 'system' -%}
    {{- text_of(messages[0].content) + ' ' -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- 'SYSTEM_PROMPT ' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set ns = namespace(text=text_of(message.content)) -%}
    {%- if '<image>' in ns.text -%}
        {%- set parts = ns.text.split('<image>') -%}
        {%- set ns.text = '' -%}
        {%- for part in parts -%}
            {%- set ns.text = ns.text + part.strip() + ('' if loop.last else ' <image>\\n') -%}
        {%- endfor -%}
        {%- set ns.text = ns.text.strip() -%}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- 'USER:' + (' ' + ns.text + ' ' if ns.text else '') -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- if ns.text -%}
            {%- generation -%}
                {{- ' ' + ns.text + '</s>' -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('roles are user and assistant, and system in front; not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
""".replace("SYSTEM_PROMPT", VICUNA_SYSTEM.replace("'", "\\'"))
)


def transformers_files(
    model: ModelConfig, vision: VILAUConfig, dtype: str, ids: Mapping[str, int], image_token_id: int
) -> JSONFiles:
    """See `HFFormat.transformers_files`."""
    tower = tower_of(vision)
    language = language_config(model, dtype, ids)
    language["dtype"] = language.pop("torch_dtype")  # as transformers calls it since 4.56
    config: dict[str, Any] = {
        **language,
        "architectures": ["VILAUForConditionalGeneration"],
        "auto_map": {
            "AutoConfig": "configuration_vila_u.VILAUConfig",
            "AutoModelForImageTextToText": "modeling_vila_u.VILAUForConditionalGeneration",
        },
        "depth_config": depth_config(model, vision, tower, {}),
        "image_token_index": image_token_id,
        "model_type": "megatron_vila_u",
        "vision_config": tower_config(tower),
        "visual_loss_weight": vision.visual_loss_weight,
    }
    processor = image_processor_config(tower)
    processor["auto_map"] |= _PROCESSOR
    return {
        "config.json": config,
        "generation_config.json": {**ids, **_GENERATION},
        "preprocessor_config.json": processor,
        "processor_config.json": {
            "processor_class": "VILAUProcessor",
            "auto_map": _PROCESSOR,
            "image_rows": vision.rows,
        },
    }


def code_files() -> list[Path]:
    """See `HFFormat.code`."""
    return [Path(__file__).with_name(name) for name in _CODE]
