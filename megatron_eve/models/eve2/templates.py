"""EVE v2's templates (`plain` and `qwen2` in the published code), as data."""

from __future__ import annotations

from dataclasses import replace

from megatron_eve.models.text_format import PLAIN, VICUNA_V1, RoleFormat, TextRules

EVE2_PLAIN = replace(
    PLAIN,
    name="eve2_plain",
    what="as plain, without white space around the caption (EVE v2)",
    clean_caption=str.strip,
    stop=("\n",),
    prompts=False,  # a caption is asked for with `plain`, which makes the same prompt
)
EVE2_QWEN2 = replace(
    VICUNA_V1,
    name="eve2_qwen2",
    what="as vicuna_v1, with <|im_end|> behind each answer (EVE v2, on Qwen2.5)",
    answer=RoleFormat("ASSISTANT:", before=" ", after="<|im_end|>"),
    stop=("<|im_end|>", "<|endoftext|>"),
)

TEXT_RULES = TextRules(templates={one.name: one for one in (EVE2_PLAIN, EVE2_QWEN2)})
