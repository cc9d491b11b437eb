"""From the configuration tree to model chunks: megatron-core's configuration, the chunks, the stage's freezing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_eve.config import RunConfig
from megatron_eve.config.pipeline_layout import write_layout
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.kernels import kernel_settings, uses_transformer_engine
from megatron_eve.models.registry import find_family
from megatron_eve.models.shapes import fixed_length
from megatron_eve.models.stages import freeze_untrained, stage_of
from megatron_eve.runtime.accelerator import accelerator

# Megatron pads the vocabulary so that it divides over tensor-parallel ranks into well-shaped pieces.
VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Vocabulary rows after padding to a multiple of 128 a tensor-parallel rank."""
    multiple = VOCAB_MULTIPLE * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def transformer_config(config: RunConfig) -> TransformerConfig:
    """megatron-core's view of the configuration: a Llama or Qwen2 decoder with this run's layout and precision."""
    model, parallel, training = config.model, config.parallel, config.training
    on_gpu = accelerator().name == "cuda"
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    built = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=write_layout(config.chunk_layers)
        if parallel.pipeline_model_parallel_size > 1
        else None,
        context_parallel_size=parallel.context_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        use_cpu_initialization=not on_gpu,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=list(training.recompute_modules) or None,
        deterministic_mode=training.deterministic_mode,
        # Where packs differ in length stages exchange shapes; megatron-core wants this dispatcher beside it,
        # although nothing here is a mixture of experts.
        variable_seq_lengths=fixed_length(config) is None,
        moe_token_dispatcher_type="alltoall",
        # Batched exchanges give silently wrong numbers under the interleaved schedule (PP 2 x VPP 2).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Freeing a sent tensor races with its sending: with gloo, and with NCCL under the interleaved schedule, which
        # does not wait for it (Megatron-LM issue 4047).
        deallocate_pipeline_outputs=on_gpu and not interleaved,
        **kernel_settings(config),
    )
    built.finalize_model_grads_func = finalize_model_grads
    return built


def build_chunk(
    config: RunConfig,
    transformer: TransformerConfig,
    *,
    transformer_engine: bool,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> VisionLanguageModel:
    """One model chunk with the front end and the objectives of the run's family, by default the whole model.

    Args:
        config: of the run.
        transformer: see `transformer_config`.
        transformer_engine, pre_process, post_process, vp_stage: see `VisionLanguageModel`.
    """
    family = find_family(config.family)

    def front_end() -> torch.nn.Module:
        module = family.front_end(config, transformer)
        assert isinstance(module, torch.nn.Module)
        return module

    return VisionLanguageModel(
        transformer,
        config.model,
        front_end=front_end,
        views={name: use for name, use in family.views(config).items() if use.stage == "first"},
        objectives=family.objectives(config),
        padded_vocab_size=padded_vocab_size(
            config.model.vocab_size, config.parallel.tensor_model_parallel_size
        ),
        transformer_engine=transformer_engine,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        lora=config.lora,
    )


def build_chunks(config: RunConfig, *, freeze: bool = True) -> list[VisionLanguageModel]:
    """This rank's model chunks (one, or one per virtual stage), bare and on the device, frozen as the stage says."""
    transformer = transformer_config(config)
    engine = uses_transformer_engine(config)
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for i in range(virtual or 1):
        vp_stage = i if virtual else None
        chunk = build_chunk(
            config,
            transformer,
            transformer_engine=engine,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        if freeze:
            freeze_untrained(chunk, stage_of(config))
        chunks.append(chunk.to(accelerator().device))
    return chunks


def unwrap(module: Any) -> VisionLanguageModel:
    """The bare chunk inside DDP and half-precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module


@contextmanager
def parameters_gathered(config: RunConfig, chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Use the parameters as they are outside a training step.

    With overlapped gathering, they arrive only when a training step's forward pass asks for them: ask now.
    """
    if not config.parallel.overlap_param_gather:
        yield
        return
    for chunk in chunks:
        chunk.disable_forward_pre_hook()  # gathers, too
    yield
    for chunk in chunks:
        chunk.enable_forward_pre_hook()
