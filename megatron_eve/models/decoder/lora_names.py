"""Names and layouts of the adapters' tensors in Hugging Face folders, as peft has them.

peft keeps A and B of each projection by itself: `...q_proj.lora_A.weight` [rank, inputs] and `...q_proj.lora_B.weight`
[outputs, rank].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from typing_extensions import override

from megatron_eve.config.lora import LoRAConfig
from megatron_eve.models.name_rules import Rule
from megatron_eve.models.tensor_layouts import QKV, Column, GatedMLP, Layout, Replicated, Row, Sizes

# Our linear layers, where they stand in a decoder layer, and the projections in each with Hugging Face's place.
LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    "mlp.linear_fc1": ("mlp", ("gate_proj", "up_proj")),
    "mlp.linear_fc2": ("mlp", ("down_proj",)),
}


class StackedA(Replicated):
    """The As of a fused matrix's projections, one above the other; the same on every tensor-parallel rank."""

    @override
    def merge(self, parts: Sequence[torch.Tensor], sizes: Sizes) -> torch.Tensor:
        return torch.cat(list(parts), 0)

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        return list(full.chunk(count, 0))


class QKVAdapter(QKV):
    """The Bs of those of query, key and value that have an adapter, interleaved by key/value group like the matrix.

    Args:
        queries: the query projection has one.
    """

    def __init__(self, queries: bool) -> None:
        self._queries = queries

    @override
    def split(self, full: torch.Tensor, sizes: Sizes, count: int) -> list[torch.Tensor]:
        grouped = full.reshape(sizes.num_query_groups, -1, sizes.head_dim, *full.shape[1:])
        heads = [1] * count
        if self._queries:
            heads[0] = grouped.shape[1] - (count - 1)
        return [part.reshape(-1, *full.shape[1:]) for part in grouped.split(heads, 1)]


def adapter_rules(lora: LoRAConfig) -> tuple[Rule, ...]:
    """The rules of the adapters' tensors (see `Rule`); none without adapters."""
    rules = []
    for layer, (place, projections) in LAYERS.items() if lora.enabled else ():
        targets = [name for name in projections if name in lora.lora_target]
        if not targets:
            continue
        modules = [f"model.layers.*.{place}.{name}" for name in targets]
        a, b = _layouts(layer, targets)
        for ours, theirs, layout in (("a", "lora_A", a), ("b", "lora_B", b)):
            names = tuple(f"{module}.{theirs}.weight" for module in modules)
            rules.append(Rule(f"decoder.layers.*.{layer}.lora.{ours}", names, layout))
    return tuple(rules)


def merged(
    name: str, weight: torch.Tensor, adapters: Mapping[str, torch.Tensor], scale: float
) -> torch.Tensor:
    """A matrix with its adapter added, in its own dtype.

    Args:
        name: of the matrix, such as model.layers.0.self_attn.q_proj.weight.
        weight: [outputs, inputs].
        adapters: A and B of its adapter by name.
        scale: alpha / rank.
    """
    a, b = (adapters[key] for key in adapter_of(name))
    wide = torch.promote_types(weight.dtype, torch.float32)  # rounded once
    return (weight.to(wide) + b.to(wide) @ a.to(wide) * scale).to(weight.dtype)


def adapter_of(name: str) -> tuple[str, str]:
    """Names of A and B of a matrix's adapter."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _layouts(layer: str, targets: Sequence[str]) -> tuple[Layout, Layout]:
    """How A and B of a layer's projections are put together."""
    if layer.endswith(("linear_proj", "linear_fc2")):
        return Row(), Replicated()
    if layer.endswith("linear_qkv"):
        return StackedA(), QKVAdapter("q_proj" in targets)
    return StackedA(), GatedMLP() if len(targets) == 2 else Column()
