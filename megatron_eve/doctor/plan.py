"""What a run without further flags would use on this machine, from the functions that choose it in training."""

from __future__ import annotations

from megatron_eve.doctor.packages import Packages
from megatron_eve.runtime.accelerator import Accelerator
from megatron_eve.runtime.machine import cudnn_attends_to_packs

ReportLine = tuple[str, str]  # label, text


def describe_plan(accelerator: Accelerator, packages: Packages) -> list[ReportLine]:
    """Backend, layers, attention, precisions, losses, gradients, image decoder and shapes, as (label, text) lines.

    Args:
        accelerator: of `runtime.accelerator.accelerator()`.
        packages: the installed packages.

    Raises:
        ImportError: a package that a run needs does not import.
    """
    from megatron_eve.config import RunConfig, TrainingConfig
    from megatron_eve.data.images.backends import chosen_backend
    from megatron_eve.models.kernels import (
        FP8_RECIPES,
        engine_lack,
        fp8_lack,
        uses_transformer_engine,
        where_gradients_are_fused,
    )
    from megatron_eve.models.shapes import fixed_length

    config = RunConfig(training=TrainingConfig(train_iters=1, bf16=True))
    engine, on_gpu = uses_transformer_engine(config), accelerator.name == "cuda"
    return [
        ("runs on", f"{'GPUs' if on_gpu else 'the CPU'}, ranks communicate through {accelerator.backend}"),
        ("layers", "TransformerEngine's (torch's without --bf16)" if engine else "torch's"),
        ("attention", _attention(accelerator, packages) if engine else "torch's, sample by sample"),
        ("bfloat16", _bfloat16(accelerator)),
        *((f"FP8 {recipe}", _yes_or_no(fp8_lack(recipe, accelerator))) for recipe in FP8_RECIPES),
        ("fused loss native", "yes"),
        ("fused loss te", _yes_or_no(engine_lack(accelerator))),
        ("weight gradients", _gradients(where_gradients_are_fused(config))),
        ("images", f"decoded by {chosen_backend('auto', on_gpu=on_gpu)}"),
        (
            "packs",
            "of one length in a step (fixed shapes)" if fixed_length(config) else "each as long as it is",
        ),
    ]


def _yes_or_no(lack: str | None) -> str:
    return "yes" if lack is None else f"no: {lack}"


def _attention(accelerator: Accelerator, packages: Packages) -> str:
    flash = packages.flash_attention
    kernels = [f"flash-attn {flash.version}"] * flash.works
    kernels += ["cuDNN"] * cudnn_attends_to_packs(accelerator.capability)
    return f"TransformerEngine's choice: {' or '.join(kernels)}"


def _gradients(fused: str) -> str:
    return (
        f"added up by the matrix product itself in {fused}"
        if fused
        else "added up after the product (unfused)"
    )


def _bfloat16(accelerator: Accelerator) -> str:
    if accelerator.capability is None:
        return "yes, to try it out"
    # The same condition as in torch.cuda.is_bf16_supported.
    return "yes" if accelerator.capability >= (8, 0) else "slow: GPUs before Ampere (8.0) emulate it"
