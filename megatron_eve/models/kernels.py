"""Which kernels a run takes on this machine: refused where they cannot run, and told at the start."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_eve.config import ConfigError, RunConfig
from megatron_eve.models.stages import stage_of
from megatron_eve.runtime.accelerator import Accelerator, accelerator
from megatron_eve.runtime.machine import cudnn_attends_to_packs

# TransformerEngine's check_fp8_support and check_fp8_block_scaling_support: compute capability, and CUDA for blocks.
_FP8_CAPABILITY = (8, 9)
_BLOCKWISE_CAPABILITY, _BLOCKWISE_CUDA = (9, 0), (12, 9)
FP8_RECIPES = ("tensorwise", "delayed", "blockwise")
# TransformerEngine's own window; megatron-core's default looks at the last update alone, which an outlier throws off.
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
    machine, training = accelerator(), config.training
    # Its attention over packs takes no float32; without fast kernels it keeps whole matrices of scores.
    fast = cudnn_attends_to_packs(machine.capability) or importlib.util.find_spec("flash_attn") is not None
    needed = training.fp8_format is not None or config.parallel.tp_comm_overlap
    automatic = machine.transformer_engine and training.bf16 and (fast or needed)
    return choice == "transformer_engine" or (choice == "auto" and automatic)


def check_kernels(config: RunConfig, machine: Accelerator) -> None:
    """Refuse precision and kernels that this machine does not have, before any process group exists.

    Raises:
        ConfigError: naming the flag and the remedy.
    """
    training = config.training
    # Flags that name TransformerEngine or need it, and what to do without.
    wanted = {
        "--tp-comm-overlap": (config.parallel.tp_comm_overlap, "leave it out"),
        "--transformer-impl transformer_engine": (
            training.transformer_impl == "transformer_engine",
            "use --transformer-impl local here",
        ),
        "--cross-entropy-fusion-impl te": (
            training.cross_entropy_loss_fusion and training.cross_entropy_fusion_impl == "te",
            "use native",
        ),
    }
    for flag, (given, remedy) in wanted.items():
        if given and (lack := engine_lack(machine)) is not None:
            raise ConfigError(f"{flag}: {lack}; {remedy}")
    if training.fp8_format is None:
        return
    lack = fp8_lack(training.fp8_recipe, machine)
    if lack is None:
        return
    others = [recipe for recipe in FP8_RECIPES if fp8_lack(recipe, machine) is None]
    if others:
        raise ConfigError(f"--fp8-recipe {training.fp8_recipe}: {lack}; use {' or '.join(others)}")
    raise ConfigError(
        f"--fp8-format {training.fp8_format}: {lack}; leave it out to train in bfloat16 (--bf16)"
    )


def engine_lack(machine: Accelerator) -> str | None:
    """What TransformerEngine's kernels lack on a machine, None if they run there."""
    return None if machine.transformer_engine else "needs a GPU and TransformerEngine (make install-gpu)"


def fp8_lack(recipe: str, machine: Accelerator) -> str | None:
    """What one of `FP8_RECIPES` lacks on a machine, None if it runs there."""
    if not machine.transformer_engine:
        return engine_lack(machine)
    assert machine.capability is not None and machine.cuda is not None
    capability = f"this GPU has {machine.capability[0]}.{machine.capability[1]}"
    if machine.capability < _FP8_CAPABILITY:
        return f"needs compute capability 8.9 (Ada, Hopper or newer), {capability}"
    blockwise = machine.capability >= _BLOCKWISE_CAPABILITY and machine.cuda >= _BLOCKWISE_CUDA
    if recipe == "blockwise" and not blockwise:
        return (
            f"needs compute capability 9.0 (Hopper or newer) and CUDA 12.9, {capability} and torch CUDA "
            f"{machine.cuda[0]}.{machine.cuda[1]}"
        )
    return None


def kernel_settings(config: RunConfig) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig that choose precision and kernels.

    FP8 is what megatron-core's TransformerBlock makes of it: a context around the decoder's layers, in which
    TransformerEngine's linear layers quantise. All else is made of torch's or megatron-core's own linear layers, which
    do not look at that context and stay in bfloat16: what a family adds (few FLOPs, pixels and small targets at its
    ends) and the output layer (whose rounding would go straight into the loss).
    """
    training = config.training
    engine, on_gpu = uses_transformer_engine(config), accelerator().name == "cuda"
    settings: dict[str, Any] = {
        "gradient_accumulation_fusion": fuses_gradient_accumulation(config),
        "cross_entropy_loss_fusion": training.cross_entropy_loss_fusion,
        "cross_entropy_fusion_impl": training.cross_entropy_fusion_impl,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": on_gpu,
        "apply_rope_fusion": engine,
        "persist_layer_norm": False,
    }
    if config.parallel.tp_comm_overlap:
        # In bulk, what one matrix product needs of other ranks travels during the other. Where weights are frozen the
        # product for their gradient, under which the input's gradient would be summed, does not take place at all.
        trains = stage_of(config).decoder_trains
        settings |= {
            "tp_comm_overlap": True,
            "tp_comm_bulk_dgrad": trains,
            "tp_comm_bulk_wgrad": trains,
        }
    if training.fp8_format is not None:
        settings |= {
            "fp8": training.fp8_format,
            "fp8_recipe": training.fp8_recipe,
            "fp8_amax_history_len": _AMAX_HISTORY,
            "fp8_amax_compute_algo": "max",
        }
    return settings


def fuses_gradient_accumulation(config: RunConfig) -> bool:
    """Do megatron-core's own linear layers add weight gradients to the float32 buffer in the matrix product itself?

    On GPUs with NVIDIA's apex, an optional source build: without its extension they, of which the output layer is one,
    refuse. TransformerEngine's need no apex (`training/loop/wrap.py`).
    """
    return (
        config.training.gradient_accumulation_fusion
        and accelerator().name == "cuda"
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    )


def where_gradients_are_fused(config: RunConfig) -> str:
    """Which layers add weight gradients in the matrix product; empty if none do."""
    decoder = config.training.gradient_accumulation_fusion and uses_transformer_engine(config)
    return " and ".join(
        ["the decoder"] * decoder + ["the output layer"] * fuses_gradient_accumulation(config)
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
    engine, fused = uses_transformer_engine(config), where_gradients_are_fused(config)
    accumulation = f"fused in {fused}" if fused else "unfused (python tools/doctor.py says why)"
    overlap = "; tensor-parallel communication overlapped" if config.parallel.tp_comm_overlap else ""
    return (
        f"layers of {'TransformerEngine' if engine else 'torch'} in {precision}; language loss {loss}; "
        f"gradient accumulation {accumulation}{overlap}"
    )


def prepare_kernels(config: RunConfig) -> None:
    """Make what TransformerEngine wants to exist before its layers do: buffers for overlapped communication.

    Collective; the process groups of the layout exist already.
    """
    parallel = config.parallel
    if not parallel.tp_comm_overlap:
        return
    from transformer_engine.pytorch import UserBufferQuantizationMode, initialize_ub

    in_fp8 = config.training.fp8_format is not None
    initialize_ub(
        shape=[config.data.seq_length // parallel.context_parallel_size, config.model.hidden_size],
        tp_size=parallel.tensor_model_parallel_size,
        quantization_modes=[UserBufferQuantizationMode.FP8 if in_fp8 else UserBufferQuantizationMode.NONE],
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",  # Megatron's default; gloo would have to find the node's own network
    )


def forget_kernels() -> None:
    """Have TransformerEngine forget the layers and buffers of a layout that ends; they hold its process groups."""
    if accelerator().transformer_engine:
        from transformer_engine.pytorch import destroy_ub
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
        destroy_ub()
