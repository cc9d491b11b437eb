"""VILA's templates: those of VILA 1.0 (NVlabs/VILA v1.0), VILA-1.5 and NVILA, as data."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.models.text_format import (
    DOCUMENT,
    IMAGE_TOKEN,
    VICUNA_V1,
    RoleFormat,
    Template,
    TextRules,
    images_in_place,
)

_LLAMA_3_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_END = "<|end_of_text|>"  # the official template of Llama 3 has <|eot_id|>


def images_first(text: str) -> str:
    """All pictures of a turn in front of it, each with a newline.

    The published code keeps one placeholder however many a turn has, and then takes the pictures of other rows.
    """
    count = text.count(IMAGE_TOKEN)
    if not count:
        return text
    return (
        f"{IMAGE_TOKEN}\n" * (count - 1) + f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
    )


def newline_behind(text: str) -> str:
    """A newline behind each picture."""
    return text.replace(IMAGE_TOKEN, f"{IMAGE_TOKEN}\n")


_VILA_V1 = replace(
    VICUNA_V1,
    name="vila_v1",
    what="as vicuna_v1, with all pictures of a turn in front of it (VILA 1.0)",
    blank_system_is_default=False,
    place_images=images_first,
)
_VILA15_V1 = replace(
    _VILA_V1,
    name="vila15_v1",
    what="as vicuna_v1, with pictures in their places (VILA-1.5)",
    place_images=images_in_place,
    place_in_prompt=images_in_place,
    adds_images=True,
)
_LLAMA_3 = replace(
    _VILA15_V1,
    name="llama_3",
    what="a conversation with the headers of Llama 3 (VILA-1.5 8B)",
    question=RoleFormat("<|start_header_id|>user<|end_header_id|>\n\n", after=_END),
    answer=RoleFormat("<|start_header_id|>assistant<|end_header_id|>\n\n", after=_END),
    system=f"<|start_header_id|>system<|end_header_id|>\n\n{{system}}{_END}",
    no_system="",
    default_system=_LLAMA_3_SYSTEM,
    stop=(_END, "<|eot_id|>"),
)
_QWEN2 = Template(
    name="qwen2",
    kinds=("conversation",),
    what="a conversation in the chat template of Qwen2, a newline behind each picture (NVILA)",
    question=RoleFormat("<|im_start|>user\n", after="<|im_end|>", behind="\n", empty="<|im_end|>\n"),
    answer=RoleFormat("<|im_start|>assistant\n", after="<|im_end|>", behind="\n", empty="<|im_end|>\n"),
    system="<|im_start|>system\n{system}<|im_end|>\n",
    no_system="<|im_start|>system\n<|im_end|>\n",
    default_system="You are a helpful assistant",
    place_images=str.strip,
    place_in_prompt=str.strip,
    adds_images=True,
    behind_image="\n",
    stop=("<|im_end|>", "<|endoftext|>"),
)
_NVILA_DOCUMENT = replace(
    DOCUMENT,
    name="nvila_document",
    what="as document, with a newline behind each picture that trains, and in front of it one that does not (NVILA)",
    place_images=newline_behind,
    behind_image="\n",
)

TEXT_RULES = TextRules(
    templates={
        template.name: template for template in (_VILA_V1, _VILA15_V1, _LLAMA_3, _QWEN2, _NVILA_DOCUMENT)
    },
    tokenizer_legacy=False,
    length_counts_rows=True,
)
