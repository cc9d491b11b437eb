#!/usr/bin/env python3
"""Compare this code with golden cases: a row for each tensor (error, tolerance), exit status 1 on any miss.

    python tools/verify_golden.py tests/golden/mini224_mixed --tensor-model-parallel-size 2 --sequence-parallel

A folder may be a model case (meta.json, inputs, outputs), `preprocess`, `tokenize` or `generate`. Layouts of
several ranks start their ranks by themselves.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_eve.config import ConfigError
from megatron_eve.runtime.errors import show_error


@dataclass(frozen=True)
class Arguments:
    """Compare golden cases with this code; print a row a tensor; exit 1 on any miss."""

    folders: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Case folders, or a folder that holds them."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split activations over the tensor-parallel ranks too."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one chunk of the interleaved schedule."""
    context_parallel_size: int = 1
    """Ranks that share one pack's tokens."""
    recompute: bool = False
    """Run with full recomputation (every layer)."""
    misses_only: bool = False
    """Print only the rows that miss."""


def main() -> None:
    """Start the ranks that the layout needs, then check."""
    arguments = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], prog="verify_golden.py")
    if not arguments.folders:
        sys.exit(show_error(ConfigError("name at least one DIR, such as tests/golden")))
    try:
        folders = case_folders(arguments.folders)
    except ConfigError as error:
        sys.exit(show_error(error))
    ranks = (
        arguments.tensor_model_parallel_size
        * arguments.pipeline_model_parallel_size
        * arguments.context_parallel_size
    )
    if ranks > 1 and "RANK" not in os.environ:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.execv(sys.executable, [sys.executable, *command, *sys.argv])
    from megatron_eve.runtime.ranks import run_rank

    run_rank(lambda: check(arguments, folders))


def case_folders(paths: list[Path]) -> list[Path]:
    """The case folders among the given ones or right below them.

    Raises:
        ConfigError: there are none.
    """
    marks = ("meta.json", "sizes.json", "cases.json", "greedy.json")
    folders: list[Path] = []
    for path in paths:
        inside = sorted(child for child in path.glob("*") if child.is_dir()) if path.is_dir() else []
        cases = [folder for folder in [path, *inside] if any((folder / mark).is_file() for mark in marks)]
        if not cases:
            raise ConfigError(f"{path}: no golden case there (a case holds one of {', '.join(marks)})")
        folders += cases
    return folders


def check(arguments: Arguments, folders: list[Path]) -> None:
    """Check every folder on this rank; exit 1 on any miss."""
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    import torch

    from megatron_eve.config import ParallelConfig
    from megatron_eve.models.process_groups import process_group
    from megatron_eve.verification.run import check_folder

    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        sequence_parallel=arguments.sequence_parallel,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        num_layers_per_virtual_pipeline_stage=arguments.num_layers_per_virtual_pipeline_stage,
        context_parallel_size=arguments.context_parallel_size,
    )
    misses = total = 0
    with process_group(parallel):
        prints = torch.distributed.get_rank() == 0
        for folder in folders:
            rows = check_folder(folder, parallel, arguments.recompute)
            total += len(rows)
            misses += sum(not row.ok for row in rows)
            if prints:
                print(f"{folder}\n{'tensor':<76s} {'error':>9s} {'tolerance':>9s}")
                for row in rows:
                    if not (row.ok and arguments.misses_only):
                        print(row)
        if prints:
            print(
                f"{total - misses} of {total} rows within tolerance"
                + ("" if total else ": nothing was compared")
            )
    if misses or not total:
        sys.exit(1)


if __name__ == "__main__":
    main()
