"""A second set of weights in every decoder layer, for rows of images (experts, arXiv 2502.06788).

Norms, matrices and biases of a layer exist twice. Each set works on its own rows alone; attention is over all rows
together. Embedding, final norm and output layer are shared. The published code computes both sets on all rows and
blends them by a mask (`moe_function`), which gives the same numbers.

The rows of a pack are sorted once, text first, where they enter the decoder, so that each set multiplies one block of
rows. Between layers, and between pipeline stages, rows stay sorted; queries, keys and values go back to the order of
the pack for attention alone:

    sorted rows -> norm -> linear_qkv -> pack's order -> attention -> sorted rows -> linear_proj -> norm -> MLP

The text weights have the names of a layer without experts, and those of images `visual_` in front of the last part
(`linear_qkv.visual_weight`), so checkpoints with and without experts have the same keys for what they share.

Shapes: n = rows of a context-parallel rank, t = those of text among them, D = width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_eve.models.decoder.expert_rows import ExpertRows
from megatron_eve.models.decoder.torch_layers import RMSNorm

if TYPE_CHECKING:
    # What both kinds of linear layers add to a class of megatron-core's.
    _Linear = torch.nn.Module
else:
    _Linear = object


def split_sets(x: torch.Tensor, text: int) -> Sequence[torch.Tensor]:
    """Sorted rows of each set, [t, ...] and [n - t, ...].

    In one operation: the gradient of two slices would be two tensors of all rows, filled with zeros and added.
    """
    return torch.split(x, [text, len(x) - text])


class ExpertNorm(RMSNorm):
    """RMSNorm with a weight for each set of rows."""

    rows: ExpertRows

    def __init__(self, config: TransformerConfig, hidden_size: int, **named: Any) -> None:
        super().__init__(config, hidden_size, **named)
        self.visual_weight = torch.nn.Parameter(torch.ones_like(self.weight))
        self.visual_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of sorted rows, [n (or its share), 1, D]; returns the input's dtype."""
        text, visual = split_sets(self.normalise(x), self.rows.text_of_share)
        return torch.cat([self.weight * text, self.visual_weight * visual])


class ExpertLinear(_Linear):
    """A linear layer of megatron-core's with a second set of weights. Base of the two kinds.

    Both sets need the same rows of other ranks, so what travels is that of a layer without experts.

    Attributes:
        visual_weight, visual_bias: of rows of images, split over the ranks as `weight` and `bias` are.
        rows: of the pack that goes through the layer next; `ExpertLayer` sets it.
        split_axes: of the parameters, for checkpoints.
        gated: the layer holds gate and up projection.
    """

    rows: ExpertRows
    split_axes: dict[str, int]
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    _forward_impl: Callable[..., torch.Tensor]
    gated = False

    def __init__(self, inputs: int, outputs: int, **named: Any) -> None:
        super().__init__(inputs, outputs, **named)
        base = ColumnParallelLinear if isinstance(self, ColumnParallelLinear) else RowParallelLinear
        twin = base(inputs, outputs, **named)
        self.visual_weight, self.visual_bias = twin.weight, twin.bias

    def multiplied(self, x: torch.Tensor) -> torch.Tensor:
        """Each set of weights on its rows, without communication: [n, 1, inputs] -> [n, 1, outputs of this rank]."""
        text, visual = split_sets(x, self.rows.text)
        return torch.cat([self.by_set(text, False), self.by_set(visual, True)])

    def by_set(self, x: torch.Tensor, visual: bool) -> torch.Tensor:
        """One set of weights on rows, without communication: [m, 1, inputs] -> [m, 1, outputs of this rank]."""
        return self._forward_impl(
            input=x,
            weight=self.visual_weight if visual else self.weight,
            bias=self.visual_bias if visual else self.bias,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=self.tp_group,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The tensors of both sets, each split over ranks as it is held."""
        metadata = metadata or {}
        tensors = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split_axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            # A rank holds its rows of both gate and up projection; megatron-core's MLP sees to those of `weight`.
            key = f"{prefix}visual_weight"
            tensors[key] = apply_swiglu_sharded_factory(
                tensors[key], sharded_offsets, metadata.get("singleton_local_shards", False)
            )
        return tensors


class ExpertColumnLinear(ExpertLinear, ColumnParallelLinear):
    """A column-parallel layer: sorted rows in, sorted rows out."""

    split_axes = dict.fromkeys(("weight", "bias", "visual_weight", "visual_bias"), 0)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """This rank's outputs of all rows, [n, 1, outputs], and no bias."""
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group)
        else:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return self.multiplied(x), None


class ExpertRowLinear(ExpertLinear, RowParallelLinear):
    """A row-parallel layer without a bias: sorted rows in, sorted rows out."""

    split_axes = dict.fromkeys(("weight", "visual_weight"), 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Outputs of all rows (or of this rank's share of them), [n, 1, outputs], and no bias."""
        y = self.multiplied(x)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group), None
        return reduce_from_tensor_model_parallel_region(y, group=self.tp_group), None


class ExpertQKV(ExpertColumnLinear):
    """Queries, keys and values, which leave in the order of the pack, as attention takes them."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """See `ExpertColumnLinear.forward`."""
        y, bias = super().forward(x)
        return y.index_select(0, self.rows.place), bias


class ExpertGatedLinear(ExpertColumnLinear):
    """Gate and up projection."""

    gated = True


class ExpertProjection(ExpertRowLinear):
    """The output projection of the attention, which takes rows in the order of the pack."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """See `ExpertRowLinear.forward`."""
        return super().forward(x.index_select(0, self.rows.order))


class ExpertLayer(TransformerLayer):
    """megatron-core's layer over sorted rows: it tells its modules which rows are of images.

    It does so at the start of each pass, also of one that recomputes activations; an MLP that is recomputed by itself
    would not hear of it (`--recompute-modules mlp`, which `config/expert_checks.py` refuses).
    """

    def forward(
        self, hidden_states: torch.Tensor, packed_seq_params: Any, **named: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One layer: [n (or its share), 1, D] of sorted rows, and what megatron-core's layer gives beside them."""
        assert packed_seq_params.expert_rows is not None, (
            "a decoder with experts needs to know rows of images"
        )
        for module in self.modules():
            if isinstance(module, ExpertNorm | ExpertLinear):
                module.rows = packed_seq_params.expert_rows
        hidden, context = super().forward(
            hidden_states=hidden_states, packed_seq_params=packed_seq_params, **named
        )
        return hidden, context


def add_experts(layer: ModuleSpec, names: dict[str, str]) -> None:
    """Give the layers of a specification a second set of weights, in place.

    Norms and linear layers become megatron-core's and torch's own also under TransformerEngine, whose linear layers
    each gather and reduce by themselves; its attention stays.

    Args:
        layer: of either specification.
        names: of the norms in a checkpoint, by their prefixes in the layer (`sharded_state_dict_keys_map`).
    """
    attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
    layer.module = ExpertLayer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = ExpertNorm
    layer.submodules.sharded_state_dict_keys_map = names
    attention.linear_qkv, attention.linear_proj = ExpertQKV, ExpertProjection
    mlp.linear_fc1, mlp.linear_fc2 = ExpertGatedLinear, ExpertRowLinear


def copy_experts(chunks: Iterable[torch.nn.Module]) -> None:
    """Make the weights for rows of images copies of those for text, as published between stage 0 and stage 1."""
    with torch.no_grad():
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, ExpertNorm | ExpertLinear):
                    module.visual_weight.copy_(module.weight)
                    if isinstance(module, ExpertLinear) and module.bias is not None:
                        module.visual_bias.copy_(module.bias)
