"""Wraps model chunks for half precision and in megatron-core's DDP, and sets up fused weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_eve.config import RunConfig
from megatron_eve.models.build import unwrap
from megatron_eve.models.decoder.model import VisionLanguageModel
from megatron_eve.models.kernels import uses_transformer_engine


def wrap_for_training(
    config: RunConfig, chunks: Sequence[VisionLanguageModel]
) -> list[DistributedDataParallel]:
    """Wrap bare chunks for half precision and in megatron-core's DDP; broadcasts weights over data-parallel ranks."""
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_fp32=config.training.bf16,
        check_for_nan_in_grad=config.faults.rerun_mode == "validate_results",
    )
    wrapped = []
    for i, chunk in enumerate(chunks):
        module = Float16Module(chunk.config, chunk) if config.training.bf16 else chunk
        # Only the first chunk of a rank reduces in buckets; later ones wait for it anyway.
        wrapped.append(DistributedDataParallel(chunk.config, ddp, module, disable_bucketing=i > 0))
    for module in wrapped:
        module.broadcast_params()
    if config.training.gradient_accumulation_fusion and uses_transformer_engine(config):
        fuse_weight_gradients(wrapped)
    if parallel.overlap_grad_reduce:
        # Only the last microbatch of a step may start the reduction.
        no_sync = [module.no_sync for module in wrapped]
        chunks[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def fuse_weight_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Have TransformerEngine's linear layers add weight gradients to DDP's float32 buffer in the matrix product itself.

    Else each is rounded to bfloat16, kept, and added by a kernel of its own. megatron-core's
    `gradient_accumulation_fusion` would ask for this, and for the same of its own linear layers, of which the output
    layer is one and refuses without NVIDIA's apex; TransformerEngine's bring their own matrix product. They look for
    the buffer (`main_grad`) in the backward pass, so DDP must have made it, and tell DDP not to add the gradient again
    (`grad_added_to_main_grad`). Frozen weights have neither and are passed over there. The first microbatch may
    overwrite the buffer instead of adding to it, which is the same: every step begins with zeros.
    """
    for chunk in chunks:
        for module in unwrap(chunk).decoder.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
