"""LoRA's adapters on megatron-core's parallel linear layers: y = W x + (alpha / rank) B A dropout(x).

megatron-core keeps query, key and value in one matrix, and gate and up projection in another. Each of these
projections has an A and a B of its own here, as in Hugging Face models with `peft`, stacked in one parameter each:

    lora.a  [projections * rank, inputs]    the As, one above the other
    lora.b  [outputs, rank]                 the Bs, in the order of the rows of the fused matrix

In a column-parallel layer A is replicated and B is split like the matrix; in a row-parallel layer A is split and B
replicated. What travels between tensor-parallel ranks is A x, `rank` numbers a token and projection. The matrix itself
keeps its name, so checkpoints with and without adapters have the same keys for it.

Shapes: n = rows of this rank's input, r = rank, m = projections with an adapter in a fused matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch.nn import functional

from megatron_eve.config.lora import LoRAConfig

if TYPE_CHECKING:
    # The adapter is a part of a linear layer; which one, its specification decides.
    _Linear = torch.nn.Module
else:
    _Linear = object


@dataclass(frozen=True)
class Projection:
    """One projection in a fused matrix.

    Attributes:
        name: as in `--lora-target`.
        rows: of one group of the fused matrix that are this projection's.
        target: it has an adapter.
    """

    name: str
    rows: int
    target: bool


class Adapter(torch.nn.Module):
    """A and B of one linear layer. Base of the two kinds.

    Args:
        config: megatron-core's.
        settings: rank, scale and dropout.
        a, b: shapes of this rank's parameters.
        inputs: of the layer, over all ranks; decides the range of A's initial values.
        group: the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: LoRAConfig,
        a: tuple[int, int],
        b: tuple[int, int],
        inputs: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        assert settings.lora_rank is not None
        self.rank, self.scale, self.dropout = settings.lora_rank, settings.scale, settings.lora_dropout
        self.group = group
        self.sequence_parallel = config.sequence_parallel and group.size() > 1
        # Drawn whole on each rank and then cut, so that tensor-parallel ranks agree. It is peft's kaiming_uniform_ with
        # a = sqrt(5), whose bound is 1 / sqrt(inputs).
        whole = torch.empty(a[0], inputs, dtype=torch.float32).uniform_(-1, 1) / math.sqrt(inputs)
        start = group.rank() * a[1] if a[1] != inputs else 0
        self.a = torch.nn.Parameter(whole[:, start : start + a[1]].to(config.params_dtype).clone())
        self.b = torch.nn.Parameter(torch.zeros(b, dtype=config.params_dtype))

    def dropped(self, x: torch.Tensor, count: int, *, same_on_ranks: bool) -> Sequence[torch.Tensor]:
        """The input with values set to zero, anew for each of `count` projections, as in peft.

        Args:
            x: the input.
            count: of projections.
            same_on_ranks: tensor-parallel ranks hold the same input, and so must draw the same zeros; otherwise each
                holds another part, and draws from a stream of its own. `training/loop/dropout.py` seeds both.
        """
        if not (self.training and self.dropout):
            return [x] * count
        tracker = tensor_parallel.get_cuda_rng_tracker()
        with nullcontext() if same_on_ranks else tracker.fork():
            return [functional.dropout(x, self.dropout) for _ in range(count)]


class ColumnAdapter(Adapter):
    """The adapter of a column-parallel layer: query, key and value, or gate and up projection.

    Args:
        config, settings, inputs, group: see `Adapter`.
        projections: of the fused matrix, in the order of its rows in each group.
        groups: of rows on this rank: key/value groups, or one for the gated MLP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: LoRAConfig,
        inputs: int,
        projections: Sequence[Projection],
        groups: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        rank = settings.lora_rank or 0
        targets = [one for one in projections if one.target]
        rows = groups * sum(one.rows for one in targets)
        super().__init__(config, settings, (len(targets) * rank, inputs), (rows, rank), inputs, group)
        self.projections, self.targets, self.groups = tuple(projections), targets, groups
        tensor_parallel.set_tensor_model_parallel_attributes(self.b, True, 0, 1)
        # Under sequence parallelism each rank's gradient of A is that of its own rows.
        self.a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to this rank's outputs.

        Args:
            x: [n, 1, inputs], the same on all tensor-parallel ranks, or under sequence parallelism a rank's rows.

        Returns:
            [n of all ranks, 1, this rank's outputs].
        """
        inputs = self.dropped(x, len(self.targets), same_on_ranks=not self.sequence_parallel)
        if self.training and self.dropout:
            parts = self.a.split(self.rank)
            z = torch.cat([functional.linear(x, a) for x, a in zip(inputs, parts, strict=True)], -1)
        else:
            z = functional.linear(x, self.a)
        if self.sequence_parallel:
            z = tensor_parallel.gather_from_sequence_parallel_region(z, group=self.group)
        else:
            z = tensor_parallel.copy_to_tensor_model_parallel_region(z, group=self.group)
        outputs = iter(self._times_b(z * self.scale))
        blank = z.new_zeros(1)
        blocks = [
            next(outputs) if one.target else blank.expand(*z.shape[:-1], self.groups, one.rows)
            for one in self.projections
        ]
        return torch.cat(blocks, -1).flatten(-2)

    def _times_b(self, z: torch.Tensor) -> list[torch.Tensor]:
        """[n, 1, groups, rows of a group] for each target, of z [n, 1, m * r]."""
        blocks = self.b.view(self.groups, -1, self.rank).split([one.rows for one in self.targets], 1)
        return [
            functional.linear(part, b.flatten(0, 1)).unflatten(-1, (self.groups, -1))
            for part, b in zip(z.split(self.rank, -1), blocks, strict=True)
        ]


class RowAdapter(Adapter):
    """The adapter of a row-parallel layer: output projection of the attention, or down projection.

    Args:
        config, settings, group: see `Adapter`.
        inputs: over all ranks.
        outputs: of the layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        settings: LoRAConfig,
        inputs: int,
        outputs: int,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        rank = settings.lora_rank or 0
        super().__init__(config, settings, (rank, inputs // group.size()), (outputs, rank), inputs, group)
        tensor_parallel.set_tensor_model_parallel_attributes(self.a, True, 1, 1)
        # Under sequence parallelism each rank's gradient of B is that of its own rows.
        self.b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the outputs.

        Args:
            x: [n, 1, this rank's inputs].

        Returns:
            [n, 1, outputs], the same on all tensor-parallel ranks, or under sequence parallelism a rank's rows.
        """
        (x,) = self.dropped(x, 1, same_on_ranks=self.group.size() == 1)
        z = functional.linear(x, self.a)
        if self.sequence_parallel:
            z = tensor_parallel.reduce_scatter_to_sequence_parallel_region(z, group=self.group)
        else:
            z = tensor_parallel.reduce_from_tensor_model_parallel_region(z, group=self.group)
        return functional.linear(z * self.scale, self.b)


class LoRALinear(_Linear):
    """A linear layer of megatron-core's or TransformerEngine's with an adapter. Base of the two kinds.

    `with_adapter` makes the classes: the layer's own class is their other base.

    Attributes:
        settings: of LoRA.
        targets: projections of the layer that have an adapter.
        lora: the adapter.
        gated: the layer holds gate and up projection.
    """

    settings: LoRAConfig
    targets: frozenset[str]
    lora: Adapter
    gated = False

    def forward(self, x: torch.Tensor, *arguments: Any, **named: Any) -> tuple[torch.Tensor, Any]:
        """The layer's output and bias."""
        output, bias = super().forward(x, *arguments, **named)
        return output + self.lora(x), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The layer's tensors and the adapter's, each split over ranks as it is held."""
        metadata = metadata or {}
        tensors = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        column = isinstance(self.lora, ColumnAdapter)
        own = make_sharded_tensors_for_checkpoint(
            {"a": self.lora.a, "b": self.lora.b},
            f"{prefix}lora.",
            {"b": 0} if column else {"a": 1},
            sharded_offsets,
            tp_group=self.lora.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated and len(self.targets) == 2:
            # A rank holds its rows of both gate and up projection, which lie far apart in the whole.
            own[f"{prefix}lora.b"] = apply_swiglu_sharded_factory(
                own[f"{prefix}lora.b"], sharded_offsets, metadata.get("singleton_local_shards", False)
            )
        return {**tensors, **own}


class _QKV(LoRALinear):
    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **named: Any) -> None:
        super().__init__(inputs, outputs, config=config, **named)
        group, head = _group(named), config.kv_channels
        queries = config.num_attention_heads // config.num_query_groups * head
        rows = {"q_proj": queries, "k_proj": head, "v_proj": head}
        projections = [Projection(name, count, name in self.targets) for name, count in rows.items()]
        groups = config.num_query_groups // group.size()
        self.lora = ColumnAdapter(config, self.settings, inputs, projections, groups, group)


class _GatedMLP(LoRALinear):
    gated = True

    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **named: Any) -> None:
        super().__init__(inputs, outputs, config=config, **named)
        group = _group(named)
        rows = outputs // 2 // group.size()
        projections = [Projection(name, rows, name in self.targets) for name in ("gate_proj", "up_proj")]
        self.lora = ColumnAdapter(config, self.settings, inputs, projections, 1, group)


class _Row(LoRALinear):
    def __init__(self, inputs: int, outputs: int, *, config: TransformerConfig, **named: Any) -> None:
        super().__init__(inputs, outputs, config=config, **named)
        self.lora = RowAdapter(config, self.settings, inputs, outputs, _group(named))


def _group(named: dict[str, Any]) -> torch.distributed.ProcessGroup:
    return get_tensor_model_parallel_group_if_none(named.get("tp_group"))


# The layers of a decoder layer that may have an adapter, and the projections in each.
_KINDS: dict[str, tuple[type[LoRALinear], tuple[str, ...]]] = {
    "linear_qkv": (_QKV, ("q_proj", "k_proj", "v_proj")),
    "linear_proj": (_Row, ("o_proj",)),
    "linear_fc1": (_GatedMLP, ("gate_proj", "up_proj")),
    "linear_fc2": (_Row, ("down_proj",)),
}


def with_adapter(layer: str, base: type[torch.nn.Module], settings: LoRAConfig) -> type[torch.nn.Module]:
    """The class of a linear layer with adapters on those of its projections that the settings name.

    Args:
        layer: its name in a decoder layer, such as linear_qkv.
        base: the specification's class: megatron-core's or TransformerEngine's.
        settings: of LoRA.

    Returns:
        A subclass of `base`; `base` itself where no projection is named.
    """
    kind, projections = _KINDS[layer]
    targets = frozenset(projections) & frozenset(settings.lora_target)
    if not targets:
        return base
    return type(f"LoRA{base.__name__}", (kind, base), {"settings": settings, "targets": targets})
