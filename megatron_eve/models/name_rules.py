"""Names of tensors: which of a Hugging Face folder make up one of this model, and in which layout.

A table of rules, read forwards, imports; read backwards, it exports. The decoder's rules are in `decoder/names.py`, a
family's in its folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_eve.models.tensor_layouts import Layout

# The embedding and the output layer, which are one matrix in some folders.
EMBEDDING_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"

# Marks the experts for rows of images in published names: without it the name is that of their twin for text.
EXPERT_MARK = ".moe_"


@dataclass(frozen=True)
class Rule:
    """How one of our tensors relates to Hugging Face tensors; `*` stands for the same text in all names.

    Attributes:
        megatron: our global name (layers numbered from 0 over all stages).
        hf: the Hugging Face names, in the order the layout merges them.
        layout: how.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


def renamed(key: str, prefixes: Mapping[str, str]) -> str:
    """A key under its other name: the longest of the prefixes that it begins with is replaced, if there is one."""
    longest = max((some for some in prefixes if key.startswith(some)), key=len, default="")
    return prefixes.get(longest, "") + key.removeprefix(longest)


def placed(key: str, folders: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """Where a tensor lies in a model of several folders, the other way round than `renamed`.

    Args:
        key: as the rules name it.
        folders: as `HFFormat.folders`.

    Returns:
        Its folder, and its key there: by the longest beginning that it has, and otherwise in the first folder, under
        the same name.
    """
    found = [
        (len(ours), folder, theirs + key.removeprefix(ours))
        for folder, prefixes in folders.items()
        for theirs, ours in prefixes.items()
        if key.startswith(ours)
    ]
    if not found:
        return next(iter(folders)), key
    _, folder, there = max(found, key=lambda some: some[0])
    return folder, there


def source_for(
    megatron_name: str, rules: Sequence[Rule], tied: bool, has_experts: bool = True
) -> tuple[Rule, tuple[str, ...]]:
    """`rule_for`, for a folder that is read.

    Args:
        megatron_name, rules: see `rule_for`.
        tied: embedding and output layer are one matrix there, and the embedding is both.
        has_experts: False: where the model has experts and the folder none, those are copies of the text weights.
    """
    rule, names = rule_for(megatron_name, rules)
    if tied and names == (HEAD_KEY,):
        names = (EMBEDDING_KEY,)
    return rule, names if has_experts else tuple(name.replace(EXPERT_MARK, ".") for name in names)


def rule_for(megatron_name: str, rules: Sequence[Rule]) -> tuple[Rule, tuple[str, ...]]:
    """The rule of one of our tensors, and its Hugging Face names with `*` filled in.

    Raises:
        KeyError: no rule names it.
    """
    for rule in rules:
        match = re.fullmatch(re.escape(rule.megatron).replace(r"\*", "(.+?)"), megatron_name)
        if match:
            matched = match.group(1) if match.groups() else ""
            return rule, tuple(name.replace("*", matched) for name in rule.hf)
    raise KeyError(f"no rule for {megatron_name}")
