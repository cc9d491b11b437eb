"""The command that trains a decoder: `torchrun --nproc-per-node N -m megatron_eve.pretrain --config recipe.yaml ...`.

`train_tower.py`, the command that trains a vision tower, runs the same code.

Imports stay inside the functions: saving a checkpoint starts a helper process that imports this module again,
and flags are checked before torch is imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_eve.config import RunConfig
    from megatron_eve.config.flags import Command
    from megatron_eve.runtime.signals import ExitSignals


def main() -> None:
    """Parse and check the configuration, then join the other ranks and train."""
    from megatron_eve.config.flags import PRETRAIN

    run_training(PRETRAIN)


def run_training(command: Command) -> None:
    """Run a command that trains, of which this process is a rank."""
    from megatron_eve.runtime.signals import ExitSignals

    with ExitSignals() as signals:
        _main(signals, command)


def _main(signals: ExitSignals, command: Command | None = None) -> None:
    from megatron_eve.config import parse
    from megatron_eve.config.describe import describe_settings
    from megatron_eve.config.recipe import named_sources
    from megatron_eve.preflight import check_memory, check_run, describe_start
    from megatron_eve.runtime.errors import UserError, show_error
    from megatron_eve.training.faults.exit_reason import write_exit_reason

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # --help is printed by one rank.
    quiet = contextlib.nullcontext() if rank == 0 else contextlib.redirect_stdout(io.StringIO())
    save = None
    try:
        with quiet:
            config = parse(command=command)
        save = config.checkpoint.save
        check_run(config, ranks)
        memory = check_memory(config, ranks)
    except (UserError, OSError) as error:  # the same on every rank
        if isinstance(error, UserError):
            write_exit_reason(save, str(error), replace=False)
        sys.exit(show_error(error))
    if rank == 0:
        settings = describe_settings(config, *named_sources())
        print(f"{describe_start(config, ranks)}\n{settings}\nmemory: {memory}", flush=True)
    from megatron_eve.runtime.ranks import run_rank

    run_rank(lambda: _train_and_record_user_error(config, signals))


def _train_and_record_user_error(config: RunConfig, signals: ExitSignals) -> None:
    """Train; write a `UserError` that ends the run to SAVE/outcome, so that the job is not requeued."""
    from megatron_eve.runtime.errors import UserError
    from megatron_eve.training.faults.exit_reason import write_exit_reason

    try:
        _train(config, signals)
    except UserError as error:
        write_exit_reason(config.checkpoint.save, str(error), replace=False)
        raise


def _train(config: RunConfig, signals: ExitSignals) -> None:
    from megatron_eve.models.process_groups import distributed, use_deterministic_kernels
    from megatron_eve.runtime.logs import configure_logging

    configure_logging()
    if config.training.deterministic_mode:
        use_deterministic_kernels()
    from megatron_eve.runtime.accelerator import accelerator
    from megatron_eve.runtime.phases import phase

    with phase("importing torch and megatron-core"):
        device = accelerator()
        from megatron_eve.checkpoint.save_lock import save_lock
        from megatron_eve.models.kernels import check_kernels
        from megatron_eve.models.registry import tower_family
        from megatron_eve.training.loop.train import train

    if tower_family(config.family):
        from megatron_eve.training.tower.run import setup as setup_tower

        start = partial(train, setup=setup_tower)
    else:
        check_kernels(config, device)
        start = partial(train)
    with distributed(config), save_lock(config.checkpoint.save):
        status = start(config, signals)
    sys.exit(status)


if __name__ == "__main__":
    main()
