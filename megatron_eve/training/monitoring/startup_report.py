"""The startup report, printed before the first step: parallel layout, kernels, memory, balance, data, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_eve.config import LoRAConfig
from megatron_eve.config.describe import write_settings
from megatron_eve.config.memory import in_units
from megatron_eve.models.kernels import describe_kernels
from megatron_eve.models.stages import stage_of
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.training.loop.data import RunData
from megatron_eve.training.loop.run import Run
from megatron_eve.training.monitoring.balance import describe_balance
from megatron_eve.training.monitoring.memory import training_bytes


def count_parameters(chunks: Sequence[DistributedDataParallel]) -> tuple[int, int]:
    """Number of parameters over tensor and pipeline ranks, and how many of them train. Collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for chunk in chunks:
        for parameter in chunk.parameters():
            counts += torch.tensor([parameter.numel(), parameter.numel() * parameter.requires_grad])
    counts = counts.to(accelerator().device)
    torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    return int(counts[0]), int(counts[1])


def print_startup_report(run: Run, total: int, trained: int) -> None:
    """Print the startup report of a decoder's run on rank 0. Collective.

    Args:
        run: that starts.
        total, trained: of `count_parameters`.
    """
    config, parallel = run.config, run.config.parallel
    virtual = config.virtual_pipeline_model_parallel_size
    print_rank_0(
        f"stage {config.training.stage} ({stage_of(config).name}) on {accelerator().name}: "
        f"TP {parallel.tensor_model_parallel_size}{' + SP' * parallel.sequence_parallel} x "
        f"PP {parallel.pipeline_model_parallel_size}{f' x VPP {virtual}' if virtual else ''} x "
        f"CP {parallel.context_parallel_size} x DP {parallel_state.get_data_parallel_world_size()}, "
        f"{total:,} parameters over tensor and pipeline ranks, {trained:,} train\n"
        f"{_adapters(config.lora)}{describe_kernels(config)}\n"
        f"{memory_and_samples(run)}"
    )
    if torch.distributed.get_rank() == 0 and (balance := describe_balance(config, run.data)):
        print(balance, flush=True)
    print_settings(run)


def memory_and_samples(run: Run, beside: Mapping[str, int] | None = None) -> str:
    """Lines about the memory of the rank that needs most, the datasets, and the length of the run. Collective.

    Args:
        run: that starts.
        beside: bytes of what every rank keeps beside the parameters of the run, by name.
    """
    config = run.config
    held = training_bytes(run.chunks, run.optimizer, config.training.bf16)
    most = torch.tensor([held.weights, held.gradients, held.optimizer])
    most = most.to(accelerator().device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    weights, gradients, optimizer = map(in_units, most.tolist())
    others = "".join(f", {name} {in_units(size)}" for name, size in (beside or {}).items())
    return (
        f"most on one rank: weights {weights}, gradient buffers {gradients}, optimizer state {optimizer}{others}\n"
        f"{_samples(run.data)}\n{config.total_samples:,} samples in "
        f"{config.total_iterations:,} iterations; starting at iteration {run.train_state.iteration}"
    )


def print_settings(run: Run) -> None:
    """Write all settings into the run's folder, and print where they are and what the frozen models are, on rank 0."""
    config = run.config
    if config.checkpoint.save and torch.distributed.get_rank() == 0:
        try:
            print(f"all settings: {write_settings(config, config.checkpoint.save)}", flush=True)
        except OSError as error:  # such as a full disk
            print(f"all settings could not be written to {error.filename} ({error.strerror})", flush=True)
    if run.frozen:
        print_rank_0(yaml.safe_dump({"frozen models": run.frozen}, sort_keys=False).rstrip())


def _adapters(lora: LoRAConfig) -> str:
    """A line about the adapters, which train in place of the language model's own weights; empty without any."""
    if not lora.enabled:
        return ""
    return (
        f"adapters (LoRA) of rank {lora.lora_rank}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on "
        f"{', '.join(lora.lora_target)}; the language model's own weights are frozen\n"
    )


def _samples(data: RunData) -> str:
    """A line for each dataset: number of samples to train on, and held out."""
    held_out = {part.name: len(part) for part in data.held_out}
    trained = {part.name: len(part) for part in data.training}
    return "\n".join(
        f"{name}: {trained.get(name, 0):,} samples to train on, {held_out.get(name, 0):,} held out"
        for name in {**trained, **held_out}
    )
