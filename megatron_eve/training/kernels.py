"""Which kernels a run takes on this machine: refused where they cannot run, and told at the start."""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_eve.accelerator import Accelerator, accelerator
from megatron_eve.config import ConfigError, RunConfig

# TransformerEngine's check_fp8_support and check_fp8_block_scaling_support: compute capability, and CUDA for blocks.
_FP8_CAPABILITY = (8, 9)
_BLOCKWISE_CAPABILITY, _BLOCKWISE_CUDA = (9, 0), (12, 9)
# TransformerEngine's own window; megatron-core's default looks at the last step alone, which an outlier throws off.
_AMAX_HISTORY = 1024


def uses_transformer_engine(config: RunConfig) -> bool:
    """Which layer specification a run builds.

    Raises:
        ConfigError: if TransformerEngine is asked for where it cannot run.
    """
    choice = config.training.transformer_impl
    if choice == "transformer_engine" and not accelerator().transformer_engine:
        raise ConfigError(
            "--transformer-impl transformer_engine: needs a GPU and TransformerEngine (make install-gpu); "
            "use --transformer-impl local here"
        )
    # TransformerEngine has no attention over packs in float32.
    automatic = choice == "auto" and accelerator().transformer_engine and config.training.bf16
    return choice == "transformer_engine" or automatic


def check_kernels(config: RunConfig, machine: Accelerator) -> None:
    """Refuse precision and kernels that this machine does not have, before any process group exists.

    Raises:
        ConfigError: naming the flag and the remedy.
    """
    training = config.training
    if training.cross_entropy_loss_fusion and training.cross_entropy_fusion_impl == "te":
        _wants_transformer_engine("--cross-entropy-fusion-impl te", "use native", machine)
    if training.fp8_format is None:
        return
    flag, remedy = f"--fp8-format {training.fp8_format}", "leave it out to train in bfloat16 (--bf16)"
    _wants_transformer_engine(flag, remedy, machine)
    assert machine.capability is not None and machine.cuda is not None
    found = f"this GPU has {machine.capability[0]}.{machine.capability[1]}"
    if machine.capability < _FP8_CAPABILITY:
        raise ConfigError(f"{flag}: needs compute capability 8.9 (Ada, Hopper or newer), {found}; {remedy}")
    blockwise = machine.capability >= _BLOCKWISE_CAPABILITY and machine.cuda >= _BLOCKWISE_CUDA
    if training.fp8_recipe == "blockwise" and not blockwise:
        raise ConfigError(
            f"--fp8-recipe blockwise: needs compute capability 9.0 (Hopper or newer) and CUDA 12.9, {found} and torch "
            f"CUDA {machine.cuda[0]}.{machine.cuda[1]}; use tensorwise or delayed"
        )


def _wants_transformer_engine(flag: str, remedy: str, machine: Accelerator) -> None:
    if not machine.transformer_engine:
        raise ConfigError(f"{flag}: needs a GPU and TransformerEngine (make install-gpu); {remedy}")


def kernel_settings(config: RunConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that choose precision and kernels.

    FP8 is what megatron-core's TransformerBlock makes of it: a context around the decoder's layers, in which
    TransformerEngine's linear layers quantise. All else is made of torch's or megatron-core's own linear layers, which
    do not look at that context and stay in bfloat16: patch embedding, projector, taps and aligning layer (few FLOPs,
    pixels and small targets at their ends) and the output layer (whose rounding would go straight into the loss).
    """
    training = config.training
    engine, on_gpu = uses_transformer_engine(config), accelerator().name == "cuda"
    settings: dict[str, Any] = {
        "gradient_accumulation_fusion": fuses_gradient_accumulation(),
        "cross_entropy_loss_fusion": training.cross_entropy_loss_fusion,
        "cross_entropy_fusion_impl": training.cross_entropy_fusion_impl,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": on_gpu,
        "apply_rope_fusion": engine,
        "persist_layer_norm": False,
    }
    if training.fp8_format is not None:
        settings |= {
            "fp8": training.fp8_format,
            "fp8_recipe": training.fp8_recipe,
            "fp8_amax_history_len": _AMAX_HISTORY,
            "fp8_amax_compute_algo": "max",
        }
    return settings


def fuses_gradient_accumulation() -> bool:
    """Are weight gradients added to the float32 buffer by the matrix product itself?

    On GPUs with NVIDIA's apex, an optional source build: without its extension megatron-core's linear layers, of which
    the output layer is one, refuse.
    """
    return (
        accelerator().name == "cuda"
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def describe_kernels(config: RunConfig) -> str:
    """A line for the start of a run: layers, precision, loss, and what is fused."""
    training = config.training
    precision = "bfloat16" if training.bf16 else "float32"
    if training.fp8_format is not None:
        precision += f", decoder matrices in FP8 ({training.fp8_format}, {training.fp8_recipe})"
    loss = (
        f"fused ({training.cross_entropy_fusion_impl})" if training.cross_entropy_loss_fusion else "unfused"
    )
    engine = uses_transformer_engine(config)
    # TransformerEngine's layers fuse it by themselves: see `fuse_weight_gradients`.
    unfused = "fused in the decoder's layers" if engine else "unfused (fused with NVIDIA apex on a GPU)"
    accumulation = "fused" if fuses_gradient_accumulation() else unfused
    return (
        f"layers of {'TransformerEngine' if engine else 'torch'} in {precision}; "
        f"language loss {loss}; gradient accumulation {accumulation}"
    )


def forget_fp8() -> None:
    """Have TransformerEngine forget the FP8 layers of a layout that ends; they hold its process groups."""
    if accelerator().transformer_engine:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
