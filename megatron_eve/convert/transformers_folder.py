"""What a model folder holds beside its weights so that today's transformers loads it by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from megatron_eve.checkpoint.hf.config import token_ids
from megatron_eve.config import ConfigError, ModelConfig
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.models.family import ModelSettings
from megatron_eve.models.registry import find_family
from megatron_eve.models.text_format import IMAGE_TOKEN, VICUNA_SYSTEM

# By template, as `data/text/conversation.py` writes it: a message's only image goes to its front. "plain" has no turns.
# The text begins with the BOS token, as templates of transformers do: its tokenizers add none to it, nor does TRL.
# `generation` marks what the labels of training are: an answer, and the end-of-sequence token behind it.
_CHAT_TEMPLATES = {
    "vicuna_v1": """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {{- '<image>\\n' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- if messages and messages[0].role == 'system' -%}
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
                {{- ' ' + text + '</s>' -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('roles are user and assistant, and system in front; not ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
""".replace("SYSTEM_PROMPT", VICUNA_SYSTEM.replace("'", "\\'")),
}

# What a tokenizer may do to a text before it looks for pieces; Llama's does nothing.
_PROBES = (
    " two  spaces ",
    "line\n\nbreaks\t",
    "ﬁ ½ Å é",
    "\u3000日本語 🙂",
    VICUNA_SYSTEM,
    "</s>USER: x <s>y",
)


def write_transformers_files(folder: Path, settings: ModelSettings, dtype: str, tokenizer: Tokenizer) -> None:
    """Write configuration, code, processor and tokenizer beside weights with the published names.

    Args:
        folder: an existing one.
        settings: sizes.
        dtype: of the weights, such as "bfloat16".
        tokenizer: Llama's.

    Raises:
        ConfigError: a tokenizer that is not Llama's.
    """
    family = find_family(settings.family)
    hf_format = family.hugging_face()
    fast, image_token_id = fast_tokenizer(Path(tokenizer.path))
    fast.save(str(folder / "tokenizer.json"))
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(settings.model, hf_format.processor_class))
    chat_template = _CHAT_TEMPLATES.get(family.chat_template())
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    ids = token_ids(tokenizer)
    files = hf_format.transformers_files(settings.model, settings.vision, dtype, ids, image_token_id)
    for name, content in files.items():
        write_json(folder / name, content)
    for module in hf_format.code:
        shutil.copyfile(module, folder / module.name)


def fast_tokenizer(path: Path) -> tuple[FastTokenizer, int]:
    """Llama's tokenizer.model as a tokenizer of the `tokenizers` library that gives the ids of training.

    Returns:
        The tokenizer, which knows `<image>`, too, and the id of that.

    Raises:
        ConfigError: it cuts texts in another way than Llama's.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    ours = Tokenizer(path)
    pieces = ours.pieces()
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
    fast = FastTokenizer(
        BPE(
            vocabulary,
            generate_merges(vocabulary, pieces),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # Each stretch between control tokens gets a leading "▁" of its own (`legacy=True`).
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ("<unk>", "<s>", "</s>", IMAGE_TOKEN)
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ours.bos_id)]
    )
    for text in _PROBES:
        if fast.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ConfigError(
                f"--tokenizer {path}: it does not cut {text!r} as Llama's would, so transformers could not do the "
                "same; use the tokenizer.model that comes with Vicuna or Llama 2"
            )
    return fast, fast.get_vocab()[IMAGE_TOKEN]


def _tokenizer_config(model: ModelConfig, processor_class: str) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.max_position_embeddings,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a configuration file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
