"""The training loop: one loop for every stage, layout and accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_eve.accelerator import accelerator
from megatron_eve.config import RunConfig
from megatron_eve.data.loader import Step, StepLoader
from megatron_eve.models.eve.teacher import Teacher
from megatron_eve.training.checkpoint import Progress, load_checkpoint, load_weights
from megatron_eve.training.checkpoint_saver import CheckpointSaver
from megatron_eve.training.compatibility import CheckpointError
from megatron_eve.training.data import RunData, build_loader, open_data
from megatron_eve.training.evaluation import evaluate
from megatron_eve.training.flops import model_flops, step_work
from megatron_eve.training.loss import Normalizer
from megatron_eve.training.memory import checkpoint_bytes, training_bytes
from megatron_eve.training.model import build_chunks, wrap_for_training
from megatron_eve.training.monitor import Monitor, print_rank_0
from megatron_eve.training.optimizer import build_optimizer, build_scheduler, learning_rate
from megatron_eve.training.signals import ExitSignals, Watchdog
from megatron_eve.training.stages import STAGES
from megatron_eve.training.step import train_step
from megatron_eve.training.teaching import build_teacher, shared_identity, teacher_sizes


@dataclass
class Trainer:
    """What a run is made of, on this rank, ready for its next step.

    Attributes:
        data: samples, their order, and what is held out.
        teacher_identity: what identifies the teacher in a checkpoint.
        teacher: on ranks of the last stage, with the aligning layer.
    """

    config: RunConfig
    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: Any
    loader: StepLoader
    data: RunData
    progress: Progress
    teacher: Teacher | None = None
    teacher_identity: dict[str, Any] | None = None


def setup(config: RunConfig) -> Trainer:
    """Build model, optimizer, schedule and data, and load what `--load` or `--pretrained-checkpoint` name.

    The process groups exist already. Data is opened first: it is the cheapest thing that can be wrong.
    """
    data = open_data(config)
    loader = build_loader(config, data)
    teacher = build_teacher(config)
    identity = shared_identity(config)
    bare = build_chunks(config)
    if config.checkpoint.pretrained_checkpoint:
        load_pretrained(config.checkpoint.pretrained_checkpoint, bare, config)
    chunks = wrap_for_training(config, bare)
    optimizer = build_optimizer(config, chunks)
    progress = Progress()
    if config.checkpoint.load:
        progress = load_checkpoint(config, chunks, optimizer, data.identity, identity)
    scheduler = build_scheduler(config, optimizer)
    scheduler.step(increment=progress.consumed_samples)
    return Trainer(config, chunks, optimizer, scheduler, loader, data, progress, teacher, identity)


def load_pretrained(folder: str, chunks: list[Any], config: RunConfig) -> None:
    """Weights alone, from a folder of ours or from one in the published Hugging Face layout."""
    if (Path(folder) / "config.json").exists():
        from megatron_eve.convert.load import load_hf_weights

        load_hf_weights(Path(folder), chunks, config.model)
    else:
        load_weights(folder, chunks, config.model)


def train_one(trainer: Trainer, monitor: Monitor | None = None) -> dict[str, torch.Tensor]:
    """One iteration: take the next samples, step, and move the run's state on.

    Returns:
        The step's losses (see `train_step`).
    """
    config, done = trainer.config, trainer.progress
    count = min(config.training.global_batch_size, config.total_samples - done.consumed_samples)
    if monitor:
        monitor.start()
    step = trainer.loader.step(done.consumed_samples, count)
    normalizer = Normalizer.of(step, config.alignment.align_loss_weight, config.training.loss_normalization)
    rate = learning_rate(trainer.optimizer)
    losses, grad_norm = train_step(trainer.chunks, trainer.optimizer, step, normalizer, trainer.teacher)
    trainer.scheduler.step(increment=count)
    trainer.progress = Progress(done.iteration + 1, done.consumed_samples + count)
    if monitor and monitor.active:
        progress, flops = trainer.progress, _flops(trainer, step)
        monitor.report(progress.iteration, progress.consumed_samples, step, losses, rate, grad_norm, flops)
    return losses


def _flops(trainer: Trainer, step: Step) -> float:
    """Model FLOPs of a step on each rank."""
    config = trainer.config
    parts = model_flops(
        config.model,
        step_work(trainer.data.dataset, step.sample_ids),
        decoder_trains=config.training.stage != 1,
        teacher=teacher_sizes(config),
    )
    return sum(parts.values()) / torch.distributed.get_world_size()


def train(config: RunConfig, signals: ExitSignals) -> None:
    """Run until the samples are used up, or there is a reason to leave before; saves on the way. Collective.

    Args:
        config: of the run.
        signals: caught since the process began.

    Raises:
        CheckpointError: a checkpoint that cannot be resumed from; a disk without room; or the last checkpoint could not
            be written.
    """
    trainer = setup(config)
    settings, start = config.training, trainer.progress.iteration
    total, trained = _count_parameters(trainer)
    announce(trainer, total, trained)
    saver = CheckpointSaver(config) if config.checkpoint.save else None
    if saver:
        saver.check_space(checkpoint_bytes(total, trained, settings.bf16))
    last_rank = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    monitor = Monitor(config, active=last_rank, start=start)
    leave = signals.received()
    # Stacks are shown before collectives time out and take the process with them.
    watchdog = Watchdog(0.9 * 60 * config.parallel.distributed_timeout_minutes)
    while trainer.progress.consumed_samples < config.total_samples and not leave:
        train_one(trainer, monitor)
        watchdog.feed()
        iteration = trainer.progress.iteration
        done = trainer.progress.consumed_samples >= config.total_samples
        leave = _reason_to_leave(config, iteration, signals)
        with watchdog.paused():
            # Before the save, so that a kill in between is made good by a resume.
            if settings.eval_interval and not leave and _is_due(settings.eval_interval, iteration, done):
                _evaluate(trainer, monitor)
            if saver:
                saver.poll()
                if _is_due(config.checkpoint.save_interval, iteration, done or bool(leave)):
                    _save(trainer, saver)
    watchdog.close()
    if leave:
        print_rank_0(f"exiting at iteration {trainer.progress.iteration} ({leave})")
    if saver:
        saver.finish()
    monitor.close()
    trainer.loader.close()
    report_damaged(trainer)
    if saver and trainer.progress.iteration not in (start, saver.last):
        raise CheckpointError(
            f"{config.checkpoint.save}: the last checkpoint of the run could not be written, see above"
        )


def _is_due(interval: int | None, iteration: int, at_the_end: bool) -> bool:
    return at_the_end or bool(interval and iteration % interval == 0)


def _reason_to_leave(config: RunConfig, iteration: int, signals: ExitSignals) -> str | None:
    """Why the run ends after this iteration, if it does. Collective."""
    caught = signals.received()
    if caught:
        return caught
    interval = config.training.exit_interval
    return f"--exit-interval {interval}" if interval and iteration % interval == 0 else None


def report_damaged(trainer: Trainer) -> None:
    """Say once how many images could not be decoded in this process's part of the run, and which. Collective."""
    everyone: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, trainer.loader.damaged)
    damaged = {image: reason for some in everyone for image, reason in some.items()}
    if damaged:
        named = ", ".join(trainer.data.dataset.image_name(image) for image in sorted(damaged))
        print_rank_0(
            f"{len(damaged)} damaged images were replaced by grey ones: {named}; the datasets were whole when they "
            "were made, so copy or preprocess them again"
        )


def _evaluate(trainer: Trainer, monitor: Monitor) -> None:
    results = evaluate(trainer.config, trainer.chunks, trainer.loader, trainer.data.held_out, trainer.teacher)
    for name, losses in results.items():
        monitor.report_held_out(trainer.progress.iteration, name, losses)


def _save(trainer: Trainer, saver: CheckpointSaver) -> None:
    saver.save(
        trainer.progress,
        trainer.chunks,
        trainer.optimizer,
        trainer.data.identity,
        trainer.teacher_identity,
    )


def _count_parameters(trainer: Trainer) -> tuple[int, int]:
    """Parameters over tensor and pipeline ranks, and how many of them train. Collective."""
    counts = torch.zeros(2, dtype=torch.int64)
    for chunk in trainer.chunks:
        for parameter in chunk.parameters():
            counts += torch.tensor([parameter.numel(), parameter.numel() * parameter.requires_grad])
    counts = counts.to(accelerator().device)
    torch.distributed.all_reduce(counts, group=parallel_state.get_model_parallel_group())
    return int(counts[0]), int(counts[1])


def announce(trainer: Trainer, total: int, trained: int) -> None:
    """Print the configuration and the plan once, before the first step. Collective.

    Args:
        trainer: of the run.
        total, trained: parameters over tensor and pipeline ranks, and how many of them train.
    """
    config, parallel = trainer.config, trainer.config.parallel
    held = training_bytes(trainer.chunks, trainer.optimizer, config.training.bf16)
    most = torch.tensor([held.weights, held.gradients, held.optimizer])
    most = most.to(accelerator().device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    weights, gradients, optimizer = (value / 2**20 for value in most.tolist())
    virtual = config.virtual_pipeline_model_parallel_size
    print_rank_0(
        f"{yaml.safe_dump(config.to_dict(), sort_keys=False)}"
        f"stage {config.training.stage} ({STAGES[config.training.stage].name}) on {accelerator().name}: "
        f"TP {parallel.tensor_model_parallel_size}{' + SP' * parallel.sequence_parallel} x "
        f"PP {parallel.pipeline_model_parallel_size}{f' x VPP {virtual}' if virtual else ''} x "
        f"CP {parallel.context_parallel_size} x DP {parallel_state.get_data_parallel_world_size()}, "
        f"{total:,} parameters over tensor and pipeline ranks, {trained:,} train\n"
        f"most on one rank, in MiB: weights {weights:,.1f}, gradient buffers {gradients:,.1f}, "
        f"optimizer state {optimizer:,.1f}\n"
        f"{_samples(trainer.data)}\n{config.total_samples:,} samples in "
        f"{config.total_iterations:,} iterations; starting at iteration {trainer.progress.iteration}"
    )
    if trainer.teacher_identity:
        print_rank_0(yaml.safe_dump({"teacher": trainer.teacher_identity}, sort_keys=False).rstrip())


def _samples(data: RunData) -> str:
    """What of each dataset is trained on and what is held out, a line each."""
    held_out = {part.name: len(part) for part in data.held_out}
    trained = {part.name: len(part) for part in data.training}
    return "\n".join(
        f"{name}: {trained.get(name, 0):,} samples to train on, {held_out.get(name, 0):,} held out"
        for name in {**trained, **held_out}
    )
