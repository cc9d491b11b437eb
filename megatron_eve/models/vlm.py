"""The vision-language model the trainer knows: a front end fills image rows, a decoder runs over the pack.

Shapes: T = tokens of a pack, R = rows that get logits, V = image rows, P = patches, I = images,
D = decoder width, W = vocabulary (padded for tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config import ModelConfig
from megatron_eve.models.decoder.layer_specs import block_spec, final_norm
from megatron_eve.models.decoder.packed import PackedParams
from megatron_eve.models.eve.front_end import EVEFrontEnd

# Rotary tables are cached by length in megatron-core; rounding lengths up keeps that cache small.
_ROTARY_STEP = 1024


@dataclass
class ModelInputs:
    """One pack on the device, as the model takes it. Fields that a pipeline stage does not need are None there.

    Attributes:
        packed: where samples begin and end.
        position_ids: int64 [T], restarting at each sample.
        tokens: int64 [T], 0 in image rows and padding (first stage).
        patches: uint8 [P, 588] (first stage).
        image_grids: int64 [I, 2], rows and columns, on the host: shapes follow from them (first stage).
        image_rows: int64 [V], where image rows go in the pack, image after image (first stage).
        output_rows: int64 [R], rows that get logits: those with a label, or the last of each prompt (last stage).
        labels: int64 [R], next token of each output row, or None for logits instead of losses (last stage).
    """

    packed: PackedParams
    position_ids: torch.Tensor
    tokens: torch.Tensor | None = None
    patches: torch.Tensor | None = None
    image_grids: torch.Tensor | None = None
    image_rows: torch.Tensor | None = None
    output_rows: torch.Tensor | None = None
    labels: torch.Tensor | None = None


class VisionLanguageModel(GPTModel):
    """One pipeline stage (or model chunk) of the model.

    `GPTModel` brings embedding, rotary embedding, decoder block and output layer. Here the front end is added on
    the first stage, the final norm stands outside the block, and logits are computed only where they are asked
    for: image rows, about three quarters of a pack, never reach the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        padded_vocab_size: int,
        transformer_engine: bool,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, transformer_engine, vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
            # Image rows are filled in before the rows are scattered over the sequence-parallel ranks.
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.true_vocab_size = model.vocab_size
        if pre_process:
            self.vision_model = EVEFrontEnd(config, model)
        if post_process:
            self.final_layernorm = final_norm(config, transformer_engine)
            # Rows are gathered before the output layer picks the labelled ones, so it sees full rows:
            # its input gradient is all-reduced, not reduce-scattered.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1

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

    def forward(self, inputs: ModelInputs) -> torch.Tensor:  # type: ignore[override]
        """Run this stage on one pack.

        Returns:
            Before the last stage: hidden states [T (or its sequence-parallel shard), 1, D].
            On the last stage: float32 losses [R] where there are labels, else logits [R, W] of the full vocabulary.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embed(inputs)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary(inputs),
            packed_seq_params=inputs.packed,
        )
        return self._output(hidden, inputs) if self.post_process else hidden

    def _rotary(self, inputs: ModelInputs) -> torch.Tensor:
        """Rotary angles, [positions, 1, 1, head dimension].

        The fused kernel restarts positions at each sample by itself. Otherwise megatron-core takes one row per
        token of the pack, which also serves a cached step, where a sample's only token is not at position 0.
        """
        if self.config.apply_rope_fusion:
            return self.rotary_pos_emb(inputs.packed.max_seqlen_q, packed_seq=True)
        longest = -(-inputs.packed.max_seqlen_kv // _ROTARY_STEP) * _ROTARY_STEP
        return self.rotary_pos_emb(longest, packed_seq=True)[inputs.position_ids]

    def _output(self, hidden: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
        assert inputs.output_rows is not None, "the last stage needs the rows that get logits"
        hidden = self.final_layernorm(hidden)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        logits, _ = self.output_layer(hidden[inputs.output_rows])  # (R, 1, W / tp)
        logits = self._mask_padded_vocabulary(logits.float())
        if inputs.labels is None:
            return gather_from_tensor_model_parallel_region(logits)[:, 0]
        return vocab_parallel_cross_entropy(logits, inputs.labels[:, None])[:, 0]

    def _mask_padded_vocabulary(self, logits: torch.Tensor) -> torch.Tensor:
        """Padded rows of the vocabulary get -inf, so that no loss depends on the tensor-parallel size."""
        width = logits.shape[-1]
        first = self.pg_collection.tp.rank() * width
        real = min(max(self.true_vocab_size - first, 0), width)
        if real == width:
            return logits
        return torch.cat(
            [logits[..., :real], logits.new_full((*logits.shape[:-1], width - real), -torch.inf)], -1
        )
