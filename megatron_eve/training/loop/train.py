"""The training loop: one loop for every kind of run, stage, layout and accelerator."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunState,
    get_rerun_state_machine,
)

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.saver import CheckpointSaver
from megatron_eve.config import RunConfig, TrainingConfig
from megatron_eve.runtime.errors import INTERRUPTED_STATUS
from megatron_eve.runtime.phases import phase
from megatron_eve.runtime.ranks import print_rank_0
from megatron_eve.runtime.signals import ExitSignals, Watchdog
from megatron_eve.training.faults.bad_steps import exit_code, exit_message
from megatron_eve.training.faults.exit_reason import write_exit_reason
from megatron_eve.training.loop.decoder_run import setup
from megatron_eve.training.loop.optimizer import learning_rate
from megatron_eve.training.loop.run import Run
from megatron_eve.training.loop.step import holds_losses
from megatron_eve.training.loop.step_result import StepResult
from megatron_eve.training.monitoring.memory import peak_memory
from megatron_eve.training.monitoring.monitor import Monitor
from megatron_eve.training.monitoring.summary import RunEnd
from megatron_eve.training.monitoring.weight_origin import startup_messages


def train_one(run: Run, monitor: Monitor | None = None) -> StepResult:
    """One iteration: take the next samples, make a step, and advance the train state unless the run ends here.

    Returns:
        The result of the step. After a bad step that the policy skips, the state is advanced without an update.
    """
    config, done, stragglers = run.config, run.train_state, run.stragglers
    count = min(config.training.global_batch_size, config.total_samples - done.consumed_samples)
    if monitor:
        monitor.start()
    with stragglers.data() if stragglers else nullcontext():
        step = run.loader.step(done.consumed_samples, count)
    rate = learning_rate(run.optimizer)
    result = run.train_step(step)
    result = replace(result, exit_code=exit_code(config.faults, result, done.skipped_in_a_row))
    if monitor and monitor.active and (result.bad or result.exit_code):
        names = [run.data.dataset.sample_name(sample) for sample in step.sample_ids.tolist()]
        monitor.report_bad_step(done.iteration + 1, result, step, names)
    if result.exit_code:
        return result
    run.scheduler.step(increment=count)
    run.train_state = done.after(count, result.values, skipped=result.bad is not None)
    if monitor and monitor.active:
        train_state, flops = run.train_state, run.flops(step)
        monitor.report(train_state.iteration, train_state.consumed_samples, step, result, rate, flops)
    return result


def train(config: RunConfig, signals: ExitSignals, setup: Callable[[RunConfig], Run] = setup) -> int:
    """Train until the samples are used up or there is a reason to stop earlier; saves checkpoints. Collective.

    Args:
        config: of the run.
        signals: the handler of signals, active since the process began.
        setup: builds the run; by default that of a decoder.

    Returns:
        The exit status: 0, or megatron-core's for a step that must be run again after a restart (16) or that ends the
        run (17).

    Raises:
        CheckpointError: a checkpoint that cannot be resumed from; a disk without room; or the last checkpoint could not
            be written.
    """
    run = setup(config)
    settings, start = config.training, run.train_state.iteration
    size = run.report()
    if torch.distributed.get_rank() == 0:
        with phase("hashing the weights that the run starts from"):
            messages = list(startup_messages(config, start, run.train_state.consumed_samples))
        print("\n".join(messages), flush=True)
    saver = CheckpointSaver(config) if config.checkpoint.save else None
    if saver:
        saver.check_space(size)
    epoch = sum(map(len, run.data.training))
    monitor = Monitor(config, active=holds_losses(), start=start, epoch_samples=epoch)
    (leave, _), status = signals.exchange(), 0
    why: str | None = None
    signals.begin_training(config.checkpoint.save)
    # Prints stack traces before collectives time out and end the process.
    watchdog = Watchdog(0.9 * 60 * config.parallel.distributed_timeout_minutes)
    while run.train_state.consumed_samples < config.total_samples and not leave:
        waited = run.loader.wait.seconds
        result = train_one(run, monitor)
        watchdog.feed()
        if result.exit_code:
            status = result.exit_code
            with watchdog.paused():
                why = _stop(run, result, saver, start)
            break
        iteration = run.train_state.iteration
        done = run.train_state.consumed_samples >= config.total_samples
        caught, largest = signals.exchange((run.loader.wait.seconds - waited, peak_memory()))
        monitor.write(*largest)
        leave = caught or _exit_interval(settings, iteration)
        if run.stragglers and monitor.is_due(iteration):
            print_rank_0(run.stragglers.report())
        with watchdog.paused():
            # Before the save: if the run is killed in between, a resumed run repeats it.
            if settings.eval_interval and not leave and _is_due(settings.eval_interval, iteration, done):
                _evaluate(run, monitor)
            if saver:
                saver.poll()
                if _is_due(config.checkpoint.save_interval, iteration, done or bool(leave)):
                    run.save(saver)
    watchdog.close()
    signals.end_training()
    if saver:
        saver.finish()
    monitor.close()
    run.loader.close()
    placeholders = report_damaged(run)
    if leave:
        _leave(run, leave)
    monitor.print_summary(_end_of(run, why or leave, start, saver, placeholders))
    if saver and run.train_state.iteration not in (start, saver.last):
        raise CheckpointError(
            f"{config.checkpoint.save}: the last checkpoint of the run could not be written, see above"
        )
    if run.train_state.consumed_samples >= config.total_samples:
        _write_exit_reason(config, "done")
    elif leave == signal.SIGINT.name:
        status = INTERRUPTED_STATUS
    return status


def _end_of(
    run: Run, reason: str | None, start: int, saver: CheckpointSaver | None, placeholders: int
) -> RunEnd:
    """How a run ended, for its summary."""
    config, done = run.config, run.train_state
    complete = done.consumed_samples >= config.total_samples
    named = "Ctrl-C (SIGINT)" if reason == signal.SIGINT.name else reason
    return RunEnd(
        reason=None if complete else named,
        start=start,
        iteration=done.iteration,
        consumed_samples=done.consumed_samples,
        saved=saver.last if saver else None,
        left_out=sum(len(part.dropped) for part in run.data.training),
        placeholders=placeholders,
    )


def _leave(run: Run, reason: str) -> None:
    """Print that a run ends early, and whether it should be started again."""
    iteration = run.train_state.iteration
    print_rank_0(f"exiting at iteration {iteration} ({reason})")
    if reason != signal.SIGTERM.name:  # which comes when Slurm decides what becomes of the job
        _write_exit_reason(run.config, f"left at iteration {iteration} ({reason}); submit it again to go on")


def _stop(run: Run, result: StepResult, saver: CheckpointSaver | None, start: int) -> str:
    """End a run at a bad step: save the state before it. Collective.

    Returns:
        A few words for the summary; the sentence itself is printed.
    """
    machine, iteration = get_rerun_state_machine(), run.train_state.iteration
    why = exit_message(run.config.faults, iteration + 1, result)
    print_rank_0(f"stopped at {why}")
    ended = f"at the bad step of iteration {iteration + 1}, see above"
    if saver is None:
        return ended
    if result.exit_code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION:
        _write_exit_reason(run.config, why)
    saver.finish()
    # Also replaces the checkpoint that this run resumed from, if its rerun state is out of date.
    reruns = machine.state is RerunState.WILL_RERUN_FROM_CHECKPOINT
    rerun = machine.state is RerunState.RERUNNING_FROM_CHECKPOINT
    if reruns or rerun or iteration not in (start, saver.last):
        run.save(saver)
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


def report_damaged(run: Run) -> int:
    """Print how many images could not be decoded since this process began, and which. Collective.

    Returns:
        How many.
    """
    gathered: list[dict[int, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, run.loader.damaged)
    damaged = {image: reason for some in gathered for image, reason in some.items()}
    if damaged:
        named = ", ".join(run.data.dataset.image_name(image) for image in sorted(damaged))
        print_rank_0(
            f"{len(damaged)} damaged images were replaced by grey ones: {named}; the datasets were whole when they "
            "were made, so copy or preprocess them again"
        )
    return len(damaged)


def _evaluate(run: Run, monitor: Monitor) -> None:
    for name, losses in run.evaluate().items():
        monitor.report_held_out(run.train_state.iteration, name, losses)
