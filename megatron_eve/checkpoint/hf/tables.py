"""The name table between the published EVE layout and this model, and the layouts of its tensors.

A rule says which Hugging Face tensors make up one of ours and how. Read forwards it imports, read backwards it
exports; `shard` and `unshard` take tensor parallelism in and out of it.

Published keys: baaivision/EVE `EVEv1` on transformers' Llama, whose decoder's are also those of Qwen2, which adds
biases to q, k and v; megatron-core's packing of q, k, v and of the gated MLP is described at `QKV` and `GatedMLP`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from typing_extensions import override

from megatron_eve.config import ModelConfig
from megatron_eve.models.family import ModelSettings


@dataclass(frozen=True)
class Sizes:
    """Sizes a layout needs beside the tensors themselves."""

    num_query_groups: int
    head_dim: int
    padded_vocab_size: int

    @staticmethod
    def of(model: ModelConfig, padded_vocab_size: int) -> Sizes:
        """From a model configuration and the padded vocabulary of this layout."""
        return Sizes(
            model.num_query_groups or model.num_attention_heads,
            model.hidden_size // model.num_attention_heads,
            padded_vocab_size,
        )


class Layout:
    """One tensor on both sides, equal on every tensor-parallel rank. Base of all others."""

    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        """Hugging Face tensors to our full tensor."""
        (part,) = parts
        return part

    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        """Our full tensor to `count` Hugging Face tensors."""
        return [full]

    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """The part of a full tensor that a tensor-parallel rank holds."""
        return full

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the shards of all tensor-parallel ranks, in rank order."""
        return shards[0]


class Replicated(Layout):
    """Norms, the patch embedding layer, biases of row-parallel matrices."""


class Column(Layout):
    """Output rows are spread over ranks."""

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return full.chunk(size, 0)[rank]

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), 0)


class Row(Layout):
    """Input columns are spread over ranks."""

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return full.chunk(size, 1)[rank]

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards), 1)


class Vocabulary(Column):
    """Rows are tokens, padded with zeros to what divides over ranks; export strips the padding.

    `split` needs the true size, so the exporter narrows its result to the vocabulary; see `to_hf`.
    """

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        (part,) = parts
        padding = part.new_zeros(sizes.padded_vocab_size - part.shape[0], *part.shape[1:])
        return torch.cat([part, padding], 0)


class QKV(Column):
    """Query, key and value matrices, or biases, interleaved by key/value group: its queries, its key, its value."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        grouped = [p.reshape(sizes.num_query_groups, -1, sizes.head_dim, *p.shape[1:]) for p in parts]
        return torch.cat(grouped, 1).reshape(-1, *parts[0].shape[1:])

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        grouped = full.reshape(sizes.num_query_groups, -1, sizes.head_dim, *full.shape[1:])
        queries = grouped.shape[1] - 2
        return [p.reshape(-1, *full.shape[1:]) for p in grouped.split([queries, 1, 1], 1)]


class GatedMLP(Layout):
    """Gate above up projection; a rank holds its part of both, one above the other."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return torch.cat(list(parts), 0)

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        return list(full.chunk(2, 0))

    @override
    def shard(self, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        return torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)], 0)

    @override
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([torch.cat([s.chunk(2, 0)[i] for s in shards], 0) for i in (0, 1)], 0)


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


_LAYER, _HF_LAYER = "decoder.layers.*", "model.layers.*"
_PROJECTOR = "vision_model.projector.encoder"
EMBEDDING_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"

EVE_RULES: tuple[Rule, ...] = (
    Rule("embedding.word_embeddings.weight", (EMBEDDING_KEY,), Vocabulary()),
    Rule(f"{_LAYER}.input_layernorm.weight", (f"{_HF_LAYER}.input_layernorm.weight",), Replicated()),
    # TransformerEngine's name of the same norm.
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.layer_norm_weight",
        (f"{_HF_LAYER}.input_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}.self_attn.{p}_proj.weight" for p in "qkv"),
        QKV(),
    ),
    Rule(f"{_LAYER}.self_attention.linear_proj.weight", (f"{_HF_LAYER}.self_attn.o_proj.weight",), Row()),
    Rule(
        f"{_LAYER}.pre_mlp_layernorm.weight", (f"{_HF_LAYER}.post_attention_layernorm.weight",), Replicated()
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.layer_norm_weight",
        (f"{_HF_LAYER}.post_attention_layernorm.weight",),
        Replicated(),
    ),
    Rule(
        f"{_LAYER}.mlp.linear_fc1.weight",
        (f"{_HF_LAYER}.mlp.gate_proj.weight", f"{_HF_LAYER}.mlp.up_proj.weight"),
        GatedMLP(),
    ),
    Rule(f"{_LAYER}.mlp.linear_fc2.weight", (f"{_HF_LAYER}.mlp.down_proj.weight",), Row()),
    Rule("final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Rule("output_layer.weight", (HEAD_KEY,), Vocabulary()),
    Rule(f"{_PROJECTOR}.linear_fc1.weight", ("model.mm_projector.0.weight",), Column()),
    Rule(f"{_PROJECTOR}.linear_fc1.bias", ("model.mm_projector.0.bias",), Column()),
    Rule(f"{_PROJECTOR}.linear_fc2.weight", ("model.mm_projector.2.weight",), Row()),
    Rule(f"{_PROJECTOR}.linear_fc2.bias", ("model.mm_projector.2.bias",), Replicated()),
    Rule("vision_model.patch_embedding.*", ("model.vision_tower.*",), Replicated()),
)

# Of a decoder with `--add-qkv-bias` (Qwen2).
QKV_BIAS_RULE = Rule(
    f"{_LAYER}.self_attention.linear_qkv.bias",
    tuple(f"{_HF_LAYER}.self_attn.{p}_proj.bias" for p in "qkv"),
    QKV(),
)

# Published keys that a model without an aligning layer does not hold, and those that none holds: the teacher, listed
# twice, and a buffer that transformers 4.31 saved.
# Its taps are named by number, and the number means a depth by the published interval only.
PUBLISHED_TAP_INTERVAL = 4
ALIGNING_HF_KEYS = re.compile(r"model\.vision_tower_compressor\.(norm_layer|input_layer|output_layer)\..*")
IGNORED_HF_KEYS = re.compile(
    r"model\.vision_tower_compressor\.clip_layer\..*|model\.vision_clip\..*"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def eve_rules(settings: ModelSettings) -> tuple[Rule, ...]:
    """All rules of a model: the fixed ones, those of the biases that it has, and those of the aligning layer.

    Its taps are numbered by depth: the published `norm_layer.j` belongs to the depth `num_layers - 4 j`, ours to that
    by `--tap-interval`. 0 is the last, behind the final norm, and the last of them the decoder's input.
    """
    return _rules(settings.model.add_qkv_bias, settings.vision.tap_depths(settings.model.num_layers))


@cache
def _rules(qkv_bias: bool, tap_depths: tuple[int, ...]) -> tuple[Rule, ...]:
    compressor = "model.vision_tower_compressor"
    rules = [QKV_BIAS_RULE] if qkv_bias else []
    for j, depth in enumerate(tap_depths):
        last, first = "aligning_layer.query_tap", "input_tap"
        tap = last if j == 0 else first if depth == 0 else f"decoder.layers.{depth - 1}.tap"
        theirs = f"{compressor}.norm_layer.{j}"
        rules += [
            Rule(f"{tap}.norm.weight", (f"{theirs}.0.weight",), Replicated()),
            Rule(f"{tap}.norm.bias", (f"{theirs}.0.bias",), Replicated()),
            Rule(f"{tap}.projection.weight", (f"{theirs}.1.weight",), Replicated()),
        ]
    for layer in ("input_layer", "output_layer"):
        rules.append(Rule(f"aligning_layer.{layer}.*", (f"{compressor}.{layer}.*",), Replicated()))
    return (*EVE_RULES, *rules)


def source_for(megatron_name: str, rules: Sequence[Rule], tied: bool) -> tuple[Rule, tuple[str, ...]]:
    """`rule_for`, for a folder that is read: where embedding and output layer are tied, the embedding is both."""
    rule, names = rule_for(megatron_name, rules)
    if tied and names == (HEAD_KEY,):
        names = (EMBEDDING_KEY,)
    return rule, names


def rule_for(megatron_name: str, rules: Sequence[Rule]) -> tuple[Rule, tuple[str, ...]]:
    """The rule of one of our tensors, and its Hugging Face names with `*` filled in.

    Raises:
        KeyError: no rule names it.
    """
    for rule in rules:
        match = re.fullmatch(re.escape(rule.megatron).replace(r"\*", "(.+?)"), megatron_name)
        if match:
            filler = match.group(1) if match.groups() else ""
            return rule, tuple(name.replace("*", filler) for name in rule.hf)
    raise KeyError(f"no rule for {megatron_name}")


def to_hf(
    megatron_name: str, shards: Sequence[torch.Tensor], sizes: Sizes, settings: ModelSettings
) -> dict[str, torch.Tensor]:
    """One of our tensors (or its gradient), given its shards in tensor-parallel order, as Hugging Face tensors."""
    rule, names = rule_for(megatron_name, eve_rules(settings))
    full = rule.layout.unshard(shards)
    if isinstance(rule.layout, Vocabulary):
        full = full[: settings.model.vocab_size]
    return dict(zip(names, rule.layout.split(full, sizes, len(names)), strict=True))
