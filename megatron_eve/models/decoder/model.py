"""The vision-language model the trainer knows: a front end fills image rows, a decoder runs over the pack.

It knows no family: the front end and the objectives are handed to it (`models/build.py`).

Shapes: T = tokens of a pack, R = rows that get logits, V = image rows, C = rows of intermediate features on this rank,
J = depths they are of, D = decoder width, K = width of intermediate features, W = vocabulary (padded for tensor
parallelism).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_eve.config import LoRAConfig, ModelConfig
from megatron_eve.models.decoder.intermediate_features import (
    FeatureProjection,
    features_before,
    join_stream,
    split_stream,
)
from megatron_eve.models.decoder.language_loss import language_losses, mask_padded_vocabulary
from megatron_eve.models.decoder.language_model import LanguageModel
from megatron_eve.models.decoder.layer_specs import block_spec, final_norm, last_chunk_layers
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.decoder.packed import PackedParams
from megatron_eve.models.family import ViewUse
from megatron_eve.models.model_parts import FamilyObjective, VisualInputs

# Rotary tables are cached by length in megatron-core; rounding lengths up keeps that cache small.
_ROTARY_STEP = 1024


@dataclass
class ModelInputs:
    """One pack on the device, as the model takes it. Fields that a pipeline stage does not need are None there.

    Attributes:
        packed: where samples begin and end.
        position_ids: int64 [T], restarting at each sample; of the whole pack, as the rotary embedding wants them.
        tokens: int64 [T], 0 in image rows and padding (first stage).
        visual: the pictures (first stage); None where no sample goes on to have any, as when generating.
        image_rows: int64 [V], where image rows go in the pack, image after image (first stage).
        context_rows: int64 [T / cp], rows of the pack that this context-parallel rank holds (None without it).
        output_rows: int64 [R], rows that get logits, those with a label or the last of each prompt, counted among
            the rows of this context-parallel rank (last stage).
        labels: int64 [R], next token of each output row, or None for logits instead of losses (last stage).
        heads: what the heads of objectives are given, by the name of the objective; one that is left out is not
            computed (last stage).
        output: makes what the last stage returns of the hidden states [R, D] of the output rows behind the final norm,
            in place of losses or logits, as for drawing; the same on all tensor-parallel ranks.
    """

    packed: PackedParams
    position_ids: torch.Tensor
    tokens: torch.Tensor | None = None
    visual: VisualInputs | None = None
    image_rows: torch.Tensor | None = None
    context_rows: torch.Tensor | None = None
    output_rows: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    heads: dict[str, Any] = field(default_factory=dict)
    output: Callable[[torch.Tensor], torch.Tensor] | None = None


ModelLosses = dict[str, torch.Tensor]
"""What the last stage computes from a pack, by the name of the objective; parts of the context-parallel ranks add up.

NextToken: float32 [R], cross entropy of each labelled row; the same on all tensor-parallel ranks.
A family's objectives: float32 of any shape. Under sequence parallelism the parts of the tensor-parallel ranks add up
    too where the objective says so, otherwise all have the same.
"""


class VisionLanguageModel(LanguageModel):
    """One pipeline stage (or model chunk) of the model.

    `LanguageModel` has embedding, rotary embedding, decoder block and output layer. Here the front end is added on
    the first stage, the final norm stands outside the block, and logits are computed only where they are asked
    for: image rows, about three quarters of a pack, never reach the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        front_end: Callable[[], torch.nn.Module],
        views: Mapping[str, ViewUse],
        objectives: Sequence[FamilyObjective],
        padded_vocab_size: int,
        transformer_engine: bool,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        """A chunk of the model.

        Args:
            config: megatron-core's.
            model: sizes of the decoder.
            front_end: builds the family's, see `model_parts.FrontEnd`; called on the first stage.
            views: what of the pictures the front end takes.
            objectives: the family's; at most one with intermediate features.
            padded_vocab_size: rows of embedding and output layer over all tensor-parallel ranks.
            transformer_engine: build TransformerEngine's layers, not torch's.
            pre_process, post_process: this is the first, the last stage.
            vp_stage: number of the model chunk on this rank; None without virtual stages.
            lora: settings of the decoder's adapters; without a rank there are none.
        """
        wanted = [objective.features for objective in objectives if objective.features is not None]
        assert len(wanted) <= 1, "at most one objective of a model may want intermediate features"
        features = wanted[0] if wanted else None
        depths = features.depths if features is not None else ()
        layers = block_spec(config, transformer_engine, vp_stage, features, lora, model.modality_experts)
        # Drawn first: how many random numbers the embedding takes depends on how the layout pads the vocabulary.
        vision_model = front_end() if pre_process else None
        super().__init__(
            config,
            model,
            layers,
            padded_vocab_size=padded_vocab_size,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.true_vocab_size = model.vocab_size
        self.has_experts = model.modality_experts
        self.views = views
        self.objectives = tuple(objectives)
        self.features = features
        # Depths before and after this chunk: how many its stream brings, and takes on.
        layers_before = get_transformer_layer_offset(config, vp_stage)
        self.features_in = features_before(layers_before + 1, depths)
        self.features_out = features_before(layers_before + len(self.decoder.layers) + 1, depths)
        # At the entrance of the last chunk.
        self.most_features = features_before(config.num_layers - last_chunk_layers(config) + 1, depths)
        if vision_model is not None:
            self.vision_model = vision_model
            if features is not None and 0 in depths:
                self.input_tap = FeatureProjection(config, features.width)
        # By objective. Those with weights are attributes, too, whose names are part of checkpoint keys.
        self.heads: dict[str, torch.nn.Module] = {}
        if post_process:
            for objective in objectives:
                head = self.heads[objective.name] = objective.head(config)
                if objective.module is not None:
                    setattr(self, objective.module, head)
            self.final_layernorm = final_norm(config, transformer_engine)

    def global_named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters with layers numbered over all stages, so that a name means the same under any layout."""
        numbers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(self.decoder.layers)}
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                parts[2] = numbers[parts[2]]
            yield ".".join(parts), parameter

    def embed(self, inputs: ModelInputs) -> torch.Tensor:
        """Token embeddings with image rows filled in.

        Returns:
            [T, 1, D], the full pack on every tensor-parallel rank.
        """
        assert inputs.tokens is not None, "the first stage needs tokens"
        hidden = self.embedding(input_ids=inputs.tokens[None], position_ids=None)  # (T, 1, D)
        if inputs.visual is None:
            return hidden
        assert inputs.image_rows is not None
        image = self.vision_model(inputs.visual)  # (V, D)
        return hidden.index_copy(0, inputs.image_rows, image[:, None].to(hidden.dtype))

    def forward(self, inputs: ModelInputs) -> torch.Tensor | ModelLosses:
        """Run this stage on one pack.

        Returns:
            Before the last stage: hidden states [T (or its shard), 1, D], with the intermediate features behind them.
            On the last stage: losses where there are labels, else logits [R, W] of the full vocabulary; or what
            `inputs.output` makes.
        """
        hidden = self._sharded_embedding(inputs) if self.pre_process else self.decoder.input_tensor
        features = None
        if self.features is not None:
            hidden, features = self._open_features(hidden, inputs, self.features.width)
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden)  # where the decoder block looks for it
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=features,
            rotary_pos_emb=self._rotary(inputs),
            packed_seq_params=inputs.packed,
        )
        if features is not None and not len(
            self.decoder.layers
        ):  # there is no last layer that makes one stream
            assert inputs.packed.feature_rows is not None
            hidden = join_stream(hidden, features, inputs.packed.feature_rows.stream_rows)
        return self._output(hidden, inputs) if self.post_process else hidden

    def _sharded_embedding(self, inputs: ModelInputs) -> torch.Tensor:
        """This rank's rows of the embedded pack: image rows first, then the cut for context and sequence."""
        hidden = self.embed(inputs)
        if inputs.context_rows is not None:
            hidden = hidden[inputs.context_rows]
        if self.has_experts:
            assert inputs.packed.expert_rows is not None, (
                "a decoder with experts needs to know rows of images"
            )
            hidden = hidden[inputs.packed.expert_rows.order]
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden

    def _open_features(
        self, hidden: torch.Tensor, inputs: ModelInputs, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, 1, D] and intermediate features [J, C, K] at the entrance of this chunk."""
        rows = inputs.packed.feature_rows
        assert rows is not None, "a model with intermediate features needs to know which rows they are of"
        if not self.pre_process:
            return split_stream(hidden, rows, self.features_in, width)
        if hasattr(self, "input_tap"):
            return hidden, self.input_tap(rows.take(hidden))[None]
        return hidden, hidden.new_empty(0, rows.count, width)

    def _rotary(self, inputs: ModelInputs) -> torch.Tensor:
        """Rotary angles, [positions, 1, 1, head dimension].

        The fused kernel restarts positions at each sample by itself. Otherwise megatron-core takes one row per
        token of the pack, which also serves a cached step, where a sample's only token is not at position 0.
        """
        longest = -(-inputs.packed.max_seqlen_kv // _ROTARY_STEP) * _ROTARY_STEP
        table = self.rotary_pos_emb(longest, packed_seq=True)
        return table if self.config.apply_rope_fusion else table[inputs.position_ids]

    def _output(self, hidden: torch.Tensor, inputs: ModelInputs) -> torch.Tensor | ModelLosses:
        assert inputs.output_rows is not None, "the last stage needs the rows that get logits"
        features, rows = None, inputs.packed.feature_rows
        if self.features is not None:
            assert rows is not None
            hidden, features = split_stream(hidden, rows, self.features_out, self.features.width)
        hidden = self.final_layernorm(hidden)
        losses: ModelLosses = {}
        for gathers_rows in (False, True):
            if gathers_rows and self.config.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
            for objective in self.objectives:
                name = objective.name
                if name in inputs.heads and objective.gathers_rows == gathers_rows:
                    losses[name] = self.heads[name](hidden, features, rows, inputs.heads[name])
        output_rows, experts = inputs.output_rows, inputs.packed.expert_rows
        if self.has_experts and experts is not None:
            output_rows = experts.place[output_rows]
        if inputs.output is not None:
            return inputs.output(hidden[output_rows, 0])
        logits, _ = self.output_layer(hidden[output_rows])  # (R, 1, W / tp)
        group = self.pg_collection.tp
        if inputs.labels is None:
            mask_padded_vocabulary(logits, self.true_vocab_size, group)
            return gather_from_tensor_model_parallel_region(logits.float())[:, 0]
        language = language_losses(logits, inputs.labels, self.true_vocab_size, self.config, group)
        return {NextToken.name: language, **losses}
