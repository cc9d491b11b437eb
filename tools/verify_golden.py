#!/usr/bin/env python3
"""Compare this code with golden cases: a row for each tensor, with its error and tolerance.

    python tools/verify_golden.py tests/golden
    python tools/verify_golden.py tests/golden/mini224_mixed \\
        --tensor-model-parallel-size 2 --sequence-parallel

A folder may be a model case (meta.json, inputs, outputs), `preprocess`, `tokenize` or `generate`, or of a form that a
model family reads. A layout of several ranks starts its ranks by itself. The exit status is 0 if all rows are within
tolerance, and 1 if one is not.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import megatron_eve.runtime.interrupts  # noqa: F401  before modules that take long
from megatron_eve.config import ConfigError
from megatron_eve.runtime.command_line import command_parser_of, whole_number
from megatron_eve.runtime.errors import show_error
from megatron_eve.verification.forms import CASE_FILES, is_case


def parse() -> argparse.Namespace:
    """The command line."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folder of a case, or a folder that holds such folders",
    )
    parser.add_argument(
        "--misses-only", action="store_true", help="print only the rows that are out of tolerance"
    )
    layout = parser.add_argument_group(
        "layout", "The parallel layout that the cases are run under, as in a training run."
    )
    for name, what in (
        ("tensor-model-parallel-size", "tensor-parallel ranks"),
        ("pipeline-model-parallel-size", "pipeline stages"),
        ("context-parallel-size", "ranks that share the tokens of one pack"),
    ):
        layout.add_argument(f"--{name}", type=whole_number(1), default=1, metavar="N", help=what)
    layout.add_argument(
        "--num-layers-per-virtual-pipeline-stage",
        type=whole_number(1),
        metavar="N",
        help="decoder layers of one chunk of the interleaved pipeline schedule (default: the plain 1F1B schedule)",
    )
    layout.add_argument(
        "--sequence-parallel",
        action="store_true",
        help="split activations over the tensor-parallel ranks, too",
    )
    layout.add_argument("--recompute", action="store_true", help="recompute every layer in the backward pass")
    return parser.parse_args()


def main() -> None:
    """Start the ranks that the layout needs, then check."""
    arguments = parse()
    try:
        folders, others = case_folders(arguments.folders)
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

    run_rank(lambda: check(arguments, folders, others))


def case_folders(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The case folders among the given ones or right below them, and the other folders beside these.

    Raises:
        ConfigError: there are none, or one of them is damaged.
    """
    folders: list[Path] = []
    others: list[Path] = []
    for path in paths:
        inside = sorted(child for child in path.glob("*") if child.is_dir()) if path.is_dir() else []
        cases = [folder for folder in [path, *inside] if is_case(folder)]
        if not cases:
            marks = ", ".join(CASE_FILES)
            raise ConfigError(
                f"{path}: no golden case there (a case holds one of {marks}, or is of a form that a model family reads)"
            )
        folders += cases
        if path not in cases:
            others += [folder for folder in inside if folder not in cases]
    return folders, others


def check(arguments: argparse.Namespace, folders: list[Path], others: list[Path]) -> None:
    """Check every folder on this rank; exit 1 on any miss. Other folders are only named."""
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
        for folder in others if prints else ():
            print(f"{folder}: passed over: holds no golden case that is read here")
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
