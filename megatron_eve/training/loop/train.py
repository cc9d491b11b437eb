"""The training loop: one loop for every stage, layout and accelerator."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunState,
    get_rerun_state_machine,
)

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.saver import CheckpointSaver
from megatron_eve.checkpoint.state import TrainState, load_checkpoint, load_weights
from megatron_eve.checkpoint.store import path_of_pretrained
from megatron_eve.config import RunConfig, TrainingConfig
from megatron_eve.data.sampling.loader import Step
from megatron_eve.models.build import build_chunks
from megatron_eve.runtime.errors import INTERRUPTED_STATUS
from megatron_eve.runtime.phases import phase
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.runtime.signals import ExitSignals, Watchdog
from megatron_eve.training.faults.bad_steps import exit_code, exit_message, start_rerun_machine
from megatron_eve.training.faults.exit_reason import write_exit_reason
from megatron_eve.training.loop.data import build_loader, open_data
from megatron_eve.training.loop.dropout import seed_dropout
from megatron_eve.training.loop.evaluation import evaluate
from megatron_eve.training.loop.loss import Normalizer, objectives_of
from megatron_eve.training.loop.optimizer import build_optimizer, build_scheduler, learning_rate
from megatron_eve.training.loop.step import holds_losses, train_step
from megatron_eve.training.loop.step_result import StepResult
from megatron_eve.training.loop.targets import build_target_models, shared_fingerprint
from megatron_eve.training.loop.trainer import Trainer
from megatron_eve.training.loop.wrap import wrap_for_training
from megatron_eve.training.monitoring.flops import model_flops, step_work
from megatron_eve.training.monitoring.memory import checkpoint_bytes, peak_memory
from megatron_eve.training.monitoring.monitor import Monitor
from megatron_eve.training.monitoring.startup_report import count_parameters, print_startup_report
from megatron_eve.training.monitoring.stragglers import Stragglers
from megatron_eve.training.monitoring.summary import RunEnd
from megatron_eve.training.monitoring.weight_origin import startup_messages


def setup(config: RunConfig) -> Trainer:
    """Build model, optimizer, schedule and data, and load what `--load` or `--pretrained-checkpoint` name.

    The process groups exist already. Data is opened first, since mistakes there are found fastest.
    """
    start_rerun_machine(config.faults)
    with phase("opening the data"):
        data = open_data(config)
    for sentence in data.dropped:
        print_rank_0(f"warning: {sentence}")
    loader = build_loader(config, data)
    with phase("loading target models"):
        models, frozen = build_target_models(config), shared_fingerprint(config)
    with phase("building the model"):
        bare = build_chunks(config)
    if pretrained := path_of_pretrained(config.checkpoint):
        with phase(f"loading weights from {pretrained}"):
            load_pretrained(str(pretrained), bare, config)
    else:
        from megatron_eve.checkpoint.hf.load import load_part_folders

        load_part_folders(bare, config)
    with phase("building the optimizer"):
        chunks = wrap_for_training(config, bare)
        optimizer = build_optimizer(config, chunks)
    train_state = TrainState()
    if config.checkpoint.load:
        with phase(f"loading {config.checkpoint.load}"):
            train_state = load_checkpoint(config, chunks, optimizer, data.fingerprint, frozen)
    scheduler = build_scheduler(config, optimizer)
    scheduler.step(increment=train_state.consumed_samples)
    # For its messages: the machine counts a step when it begins, and has already counted one that is run again.
    rerun = get_rerun_state_machine().state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    get_rerun_state_machine().current_iteration = train_state.iteration + rerun
    stragglers = Stragglers() if config.logging.log_straggler else None
    return Trainer(
        config, chunks, optimizer, scheduler, loader, data, train_state, models, frozen, stragglers
    )


def load_pretrained(folder: str, chunks: list[Any], config: RunConfig) -> None:
    """Load weights alone, from a checkpoint folder or from one in the published Hugging Face layout."""
    if (Path(folder) / "config.json").exists():
        from megatron_eve.checkpoint.hf.load import load_hf_weights

        load_hf_weights(Path(folder), chunks, config)
    else:
        load_weights(folder, chunks, config)


def train_one(trainer: Trainer, monitor: Monitor | None = None) -> StepResult:
    """One iteration: take the next samples, make a step, and advance the train state unless the run ends here.

    Returns:
        The result of the step. After a bad step that the policy skips, the state is advanced without an update.
    """
    config, done, stragglers = trainer.config, trainer.train_state, trainer.stragglers
    count = min(config.training.global_batch_size, config.total_samples - done.consumed_samples)
    if monitor:
        monitor.start()
    with stragglers.data() if stragglers else nullcontext():
        step = trainer.loader.step(done.consumed_samples, count)
    normalizer = Normalizer.of(step, objectives_of(config), config.training.loss_normalization)
    rate = learning_rate(trainer.optimizer)
    result = train_step(
        trainer.chunks,
        trainer.optimizer,
        step,
        normalizer,
        trainer.target_models,
        recent=done.recent,
        spike_factor=config.faults.spike_factor,
        stragglers=stragglers,
        seed=partial(seed_dropout, config, done.consumed_samples),
    )
    result = replace(result, exit_code=exit_code(config.faults, result, done.skipped_in_a_row))
    if monitor and monitor.active and (result.bad or result.exit_code):
        names = [trainer.data.dataset.sample_name(sample) for sample in step.sample_ids.tolist()]
        monitor.report_bad_step(done.iteration + 1, result, step, names)
    if result.exit_code:
        return result
    trainer.scheduler.step(increment=count)
    trainer.train_state = done.after(count, result.values, skipped=result.bad is not None)
    if monitor and monitor.active:
        train_state, flops = trainer.train_state, _flops(trainer, step)
        monitor.report(train_state.iteration, train_state.consumed_samples, step, result, rate, flops)
    return result


def _flops(trainer: Trainer, step: Step) -> float:
    """Model FLOPs of a step on each rank."""
    parts = model_flops(trainer.config, step_work(trainer.data.dataset, step.sample_ids))
    return sum(parts.values()) / torch.distributed.get_world_size()


def train(config: RunConfig, signals: ExitSignals) -> int:
    """Train until the samples are used up or there is a reason to stop earlier; saves checkpoints. Collective.

    Args:
        config: of the run.
        signals: the handler of signals, active since the process began.

    Returns:
        The exit status: 0, or megatron-core's for a step that must be run again after a restart (16) or that ends the
        run (17).

    Raises:
        CheckpointError: a checkpoint that cannot be resumed from; a disk without room; or the last checkpoint could not
            be written.
    """
    trainer = setup(config)
    settings, start = config.training, trainer.train_state.iteration
    total, trained = count_parameters(trainer.chunks)
    print_startup_report(trainer, total, trained)
    if torch.distributed.get_rank() == 0:
        with phase("hashing the weights that the run starts from"):
            messages = list(startup_messages(config, start, trainer.train_state.consumed_samples))
        print("\n".join(messages), flush=True)
    saver = CheckpointSaver(config) if config.checkpoint.save else None
    if saver:
        saver.check_space(checkpoint_bytes(total, trained, settings.bf16))
    epoch = sum(map(len, trainer.data.training))
    monitor = Monitor(config, active=holds_losses(), start=start, epoch_samples=epoch)
    (leave, _), status = signals.exchange(), 0
    why: str | None = None
    signals.begin_training(config.checkpoint.save)
    # Prints stack traces before collectives time out and end the process.
    watchdog = Watchdog(0.9 * 60 * config.parallel.distributed_timeout_minutes)
    while trainer.train_state.consumed_samples < config.total_samples and not leave:
        waited = trainer.loader.wait.seconds
        result = train_one(trainer, monitor)
        watchdog.feed()
        if result.exit_code:
            status = result.exit_code
            with watchdog.paused():
                why = _stop(trainer, result, saver, start)
            break
        iteration = trainer.train_state.iteration
        done = trainer.train_state.consumed_samples >= config.total_samples
        caught, largest = signals.exchange((trainer.loader.wait.seconds - waited, peak_memory()))
        monitor.write(*largest)
        leave = caught or _exit_interval(settings, iteration)
        if trainer.stragglers and monitor.is_due(iteration):
            print_rank_0(trainer.stragglers.report())
        with watchdog.paused():
            # Before the save: if the run is killed in between, a resumed run repeats it.
            if settings.eval_interval and not leave and _is_due(settings.eval_interval, iteration, done):
                _evaluate(trainer, monitor)
            if saver:
                saver.poll()
                if _is_due(config.checkpoint.save_interval, iteration, done or bool(leave)):
                    _save(trainer, saver)
    watchdog.close()
    signals.end_training()
    if saver:
        saver.finish()
    monitor.close()
    trainer.loader.close()
    placeholders = report_damaged(trainer)
    if leave:
        _leave(trainer, leave)
    monitor.print_summary(_end_of(trainer, why or leave, start, saver, placeholders))
    if saver and trainer.train_state.iteration not in (start, saver.last):
        raise CheckpointError(
            f"{config.checkpoint.save}: the last checkpoint of the run could not be written, see above"
        )
    if trainer.train_state.consumed_samples >= config.total_samples:
        _write_exit_reason(config, "done")
    elif leave == signal.SIGINT.name:
        status = INTERRUPTED_STATUS
    return status


def _end_of(
    trainer: Trainer, reason: str | None, start: int, saver: CheckpointSaver | None, placeholders: int
) -> RunEnd:
    """How a run ended, for its summary."""
    config, done = trainer.config, trainer.train_state
    complete = done.consumed_samples >= config.total_samples
    named = "Ctrl-C (SIGINT)" if reason == signal.SIGINT.name else reason
    return RunEnd(
        reason=None if complete else named,
        start=start,
        iteration=done.iteration,
        consumed_samples=done.consumed_samples,
        saved=saver.last if saver else None,
        left_out=sum(len(part.dropped) for part in trainer.data.training),
        placeholders=placeholders,
    )


def _leave(trainer: Trainer, reason: str) -> None:
    """Print that a run ends early, and whether it should be started again."""
    iteration = trainer.train_state.iteration
    print_rank_0(f"exiting at iteration {iteration} ({reason})")
    if reason != signal.SIGTERM.name:  # which comes when Slurm decides what becomes of the job
        _write_exit_reason(
            trainer.config, f"left at iteration {iteration} ({reason}); submit it again to go on"
        )


def _stop(trainer: Trainer, result: StepResult, saver: CheckpointSaver | None, start: int) -> str:
    """End a run at a bad step: save the state before it. Collective.

    Returns:
        A few words for the summary; the sentence itself is printed.
    """
    machine, iteration = get_rerun_state_machine(), trainer.train_state.iteration
    why = exit_message(trainer.config.faults, iteration + 1, result)
    print_rank_0(f"stopped at {why}")
    ended = f"at the bad step of iteration {iteration + 1}, see above"
    if saver is None:
        return ended
    if result.exit_code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION:
        _write_exit_reason(trainer.config, why)
    saver.finish()
    # Also replaces the checkpoint that this run resumed from, if its rerun state is out of date.
    reruns = machine.state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    rerun = machine.state is RerunState.RERUNNING_FROM_CHECKPOINT
    if reruns or rerun or iteration not in (start, saver.last):
        _save(trainer, saver)
    return ended


def _write_exit_reason(config: RunConfig, why: str) -> None:
    if torch.distributed.get_rank() == 0:
        write_exit_reason(config.checkpoint.save, why)


def _is_due(interval: int | None, iteration: int, at_the_end: bool) -> bool:
    return at_the_end or bool(interval and iteration % interval == 0)


def _exit_interval(settings: TrainingConfig, iteration: int) -> str | None:
    """The flag that ends the run after this iteration; None if it goes on."""
    interval = settings.exit_interval
    return f"--exit-interval {interval}" if interval and iteration % interval == 0 else None


def report_damaged(trainer: Trainer) -> int:
    """Print how many images could not be decoded since this process began, and which. Collective.

    Returns:
        How many.
    """
    gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, trainer.loader.damaged)
    damaged = {image: reason for some in gathered for image, reason in some.items()}
    if damaged:
        named = ", ".join(trainer.data.dataset.image_name(image) for image in sorted(damaged))
        print_rank_0(
            f"{len(damaged)} damaged images were replaced by grey ones: {named}; the datasets were whole when they "
            "were made, so copy or preprocess them again"
        )
    return len(damaged)


def _evaluate(trainer: Trainer, monitor: Monitor) -> None:
    results = evaluate(
        trainer.config, trainer.chunks, trainer.loader, trainer.data.held_out, trainer.target_models
    )
    for name, losses in results.items():
        monitor.report_held_out(trainer.train_state.iteration, name, losses)


def _save(trainer: Trainer, saver: CheckpointSaver) -> None:
    saver.save(
        trainer.train_state,
        trainer.chunks,
        trainer.optimizer,
        trainer.data.fingerprint,
        trainer.frozen,
    )
