"""The vision-language model the trainer knows: a front end fills image rows, a decoder runs over the pack.

Shapes: T = tokens of a pack, R = rows that get logits, V = image rows, P = patches, I = images, C = tapped rows on
this rank, D = decoder width, K = teacher width, W = vocabulary (padded for tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.models.decoder.depth_taps import DepthTap, split_stream, taps_before
from megatron_eve.models.decoder.language_loss import language_losses, mask_padded_vocabulary
from megatron_eve.models.decoder.language_model import LanguageModel
from megatron_eve.models.decoder.layer_specs import block_spec, final_norm
from megatron_eve.models.decoder.next_token import NextToken
from megatron_eve.models.decoder.packed import PackedParams
from megatron_eve.models.eve.front_end import EVEFrontEnd
from megatron_eve.models.eve.patch_aligning import PatchAligningLayer, aligning_loss
from megatron_eve.models.family import ModelSettings

# Rotary tables are cached by length in megatron-core; rounding lengths up keeps that cache small.
_ROTARY_STEP = 1024


@dataclass
class ModelInputs:
    """One pack on the device, as the model takes it. Fields that a pipeline stage does not need are None there.

    Attributes:
        packed: where samples begin and end.
        position_ids: int64 [T], restarting at each sample; of the whole pack, as the rotary embedding wants them.
        tokens: int64 [T], 0 in image rows and padding (first stage).
        patches: uint8 [P, 588] (first stage).
        image_grids: int64 [I, 2], rows and columns, on the host: shapes follow from them (first stage).
        image_rows: int64 [V], where image rows go in the pack, image after image (first stage).
        context_rows: int64 [T / cp], rows of the pack that this context-parallel rank holds (None without it).
        output_rows: int64 [R], rows that get logits, those with a label or the last of each prompt, counted among
            the rows of this context-parallel rank (last stage).
        labels: int64 [R], next token of each output row, or None for logits instead of losses (last stage).
        teacher_features: [C, K], what the tapped rows should look like (last stage, with the aligning layer).
        cell_weights: float32 [C], one over the teacher patches of each row's image (likewise).
    """

    packed: PackedParams
    position_ids: torch.Tensor
    tokens: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    image_rows: torch.Tensor | None = None
    context_rows: torch.Tensor | None = None
    output_rows: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    teacher_features: torch.Tensor | None = None
    cell_weights: torch.Tensor | None = None


ModelLosses = dict[str, torch.Tensor]
"""What the last stage computes from a pack, by the name of the objective; parts of the context-parallel ranks add up.

NextToken: float32 [R], cross entropy of each labelled row; the same on all tensor-parallel ranks.
PatchAligningLayer.objective: float32 scalar, sum over images of 1 - mean cosine (only with the aligning layer). Under
    sequence parallelism the parts of the tensor-parallel ranks add up too, otherwise all have the same.
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
        settings: ModelSettings,
        *,
        padded_vocab_size: int,
        transformer_engine: bool,
        patch_aligning: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        model, vision = settings.model, settings.vision
        tap_depths = vision.tap_depths(model.num_layers) if patch_aligning else ()
        layers = block_spec(
            config, transformer_engine, vp_stage, tap_depths=tap_depths, tap_width=vision.teacher_hidden_size
        )
        # Drawn first: how many random numbers the embedding takes depends on how the layout pads the vocabulary.
        front_end = EVEFrontEnd(config, vision) if pre_process else None
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
        self.patch_aligning = patch_aligning
        self.pooling = vision.pooling
        self.tap_width = vision.teacher_hidden_size
        # Tapped depths before and after this chunk: how many taps its stream brings, and takes on.
        layer_numbers = [layer.layer_number for layer in self.decoder.layers]
        self.taps_in = taps_before(layer_numbers[0], tap_depths)
        self.taps_out = taps_before(min(layer_numbers[-1] + 1, config.num_layers), tap_depths)
        # At the entrance of the last of equal chunks.
        chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        self.most_taps = taps_before(config.num_layers - config.num_layers // chunks + 1, tap_depths)
        if front_end is not None:
            self.vision_model = front_end
            if 0 in tap_depths:
                self.input_tap = DepthTap(config, vision.teacher_hidden_size)
        if post_process:
            if patch_aligning:
                self.aligning_layer = PatchAligningLayer(config, vision)
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
        assert inputs.tokens is not None and inputs.patches is not None, (
            "the first stage needs tokens and patches"
        )
        assert inputs.image_grids is not None and inputs.image_rows is not None
        hidden = self.embedding(input_ids=inputs.tokens[None], position_ids=None)  # (T, 1, D)
        image = self.vision_model(inputs.patches, inputs.image_grids)  # (V, D)
        return hidden.index_copy(0, inputs.image_rows, image[:, None].to(hidden.dtype))

    def forward(self, inputs: ModelInputs) -> torch.Tensor | ModelLosses:
        """Run this stage on one pack.

        Returns:
            Before the last stage: hidden states [T (or its shard), 1, D], with the taps behind them.
            On the last stage: losses where there are labels, else logits [R, W] of the full vocabulary.
        """
        hidden = self._sharded_embedding(inputs) if self.pre_process else self.decoder.input_tensor
        taps = None
        if self.patch_aligning:
            hidden, taps = self._open_taps(hidden, inputs)
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden)  # where the decoder block looks for it
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=taps,
            rotary_pos_emb=self._rotary(inputs),
            packed_seq_params=inputs.packed,
        )
        return self._output(hidden, inputs) if self.post_process else hidden

    def _sharded_embedding(self, inputs: ModelInputs) -> torch.Tensor:
        """This rank's rows of the embedded pack: image rows first, then the cut for context and sequence."""
        hidden = self.embed(inputs)
        if inputs.context_rows is not None:
            hidden = hidden[inputs.context_rows]
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden

    def _open_taps(self, hidden: torch.Tensor, inputs: ModelInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, 1, D] and taps [J, C, K] at the entrance of this chunk."""
        rows = inputs.packed.taps
        assert rows is not None, "the aligning layer needs to know which rows are tapped"
        if not self.pre_process:
            return split_stream(hidden, rows, self.taps_in, self.tap_width)
        if hasattr(self, "input_tap"):
            return hidden, self.input_tap(rows.take(hidden))[None]
        return hidden, hidden.new_empty(0, rows.count, self.tap_width)

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
        taps, rows = None, inputs.packed.taps
        if rows is not None:
            hidden, taps = split_stream(hidden, rows, self.taps_out, self.tap_width)
        hidden = self.final_layernorm(hidden)
        aligning: ModelLosses = {}
        if taps is not None and inputs.teacher_features is not None:
            assert rows is not None and inputs.cell_weights is not None
            predictions = self.aligning_layer(rows.take(hidden), taps)
            loss = aligning_loss(predictions, inputs.teacher_features, inputs.cell_weights)
            aligning = {PatchAligningLayer.objective: loss}
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        logits, _ = self.output_layer(hidden[inputs.output_rows])  # (R, 1, W / tp)
        group = self.pg_collection.tp
        if inputs.labels is None:
            mask_padded_vocabulary(logits, self.true_vocab_size, group)
            return gather_from_tensor_model_parallel_region(logits.float())[:, 0]
        language = language_losses(logits, inputs.labels, self.true_vocab_size, self.config, group)
        return {NextToken.name: language, **aligning}
