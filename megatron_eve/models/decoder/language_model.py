"""The language model under every family: token embedding, rotary embedding, decoder layers and output layer.

Composed from megatron-core's modules under the names that its `GPTModel` gives them (deprecated in 0.19), so that
checkpoints have the same keys.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config import ModelConfig


class LanguageModel(LanguageModule):
    """The modules of one pipeline stage (or model chunk); what runs them is in the class that inherits from it.

    Attributes:
        embedding: of tokens, on the first stage.
        rotary_pos_emb: tables of rotary angles.
        decoder: this chunk's layers, without a final norm.
        output_layer: to the vocabulary, on the last stage. Its weight is not shared with the embedding.
        vocab_size: rows of embedding and output layer over all tensor-parallel ranks, with their padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        layers: TransformerBlockSubmodules,
        *,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        # megatron-core's schedules, gradient finalisation and layers read these five.
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.vocab_size = padded_vocab_size
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="rope",
                # Image rows are filled in before the rows are scattered over the sequence-parallel ranks.
                scatter_to_sequence_parallel=False,
                tp_group=self.pg_collection.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=config.rotary_interleaved,
            seq_len_interpolation_factor=model.rotary_seq_len_interpolation_factor,
            rotary_base=model.rotary_base,
            rope_scaling=model.use_rope_scaling,
            rope_scaling_factor=model.rope_scaling_factor,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )
        self.decoder = TransformerBlock(
            config=config,
            spec=layers,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=self.pg_collection.tp,
            )
            # Rows are gathered before the output layer picks the labelled ones, so it sees full rows: its input
            # gradient is all-reduced, not reduce-scattered.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        # TransformerEngine's layers cannot run before they know how they quantise.
        for name, module in self.named_modules():
            if hasattr(module, "finish_init"):
                module.finish_init(get_quant_config_or_none(name, config.quant_recipe))

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take what the stage before sent, [rows, 1, D]; called by megatron-core's schedules, with a list of one."""
        (received,) = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self.decoder.set_input_tensor(received)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Tensors of a checkpoint by name, without the output layer's extra state, which holds nothing."""
        tensors = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        tensors.pop(f"{prefix}output_layer._extra_state", None)
        return tensors
