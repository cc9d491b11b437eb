"""BF16 compared with FP8: time of training steps, and losses of the same 200 steps from the same weights.

    python benchmarks/gpu_fp8.py --layers 8 --loss-layers 2 --losses 200 \\
        --out tables
    python benchmarks/gpu_fp8.py --toy

Stage 2 of `eve_7b` at full width, without the aligning layer. Timed steps have several full packs and
many layers, since FP8 applies only to the matrix products of the decoder. Losses are compared with few layers, on 48
repeated samples that the model overfits; all recipes use the same seed and samples. Recipes that this GPU does not
support are noted and skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu_common import (
    STEP_HEADER,
    first_losses,
    measure,
    parser,
    photo_dataset,
    require_gpu,
    run_config,
    sizes,
    step_columns,
)
from tables import Table, exit_if_failed

from megatron_eve.config import ConfigError, ParallelConfig, RunConfig

RECIPES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "FP8 delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "FP8 tensorwise": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "FP8 blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
}


def runs_here(table: Table, some: Callable[..., RunConfig]) -> Iterator[tuple[str, RunConfig]]:
    """Yield (recipe, configuration); recipes that cannot run on this machine are noted and skipped."""
    from megatron_eve.models.kernels import check_kernels
    from megatron_eve.runtime.accelerator import accelerator

    for name, settings in RECIPES.items():
        config = some(**settings)
        try:
            check_kernels(config, accelerator())
        except ConfigError as error:
            table.note(f"Not run, {name}: {error}")
            continue
        yield name, config


def time_steps(arguments: Any) -> Table:
    """Time steps of several full packs, by recipe."""
    table = Table("FP8 steps", ("precision", "speed-up", *STEP_HEADER), arguments.out)
    samples, length = (4, 1024) if arguments.toy else (54, 8192)
    some = partial(
        run_config, sizes("eve_7b", arguments.toy, arguments.layers), samples=samples, seq_length=length
    )
    base = None
    for name, config in runs_here(table, some):
        with table.attempt(name):
            found = measure(config, arguments.steps)
            base = base or found.tokens
            table.add(name, f"{found.tokens / base:.2f}", *step_columns(found))
    return table


def compare_losses(arguments: Any, folder: Path) -> Table:
    """Compare the losses of `--losses` steps on a few repeated samples, by recipe."""
    last = max(arguments.losses // 10, 1)
    header = ("precision", "first loss", f"mean of the last {last}", "from bfloat16", "furthest of a step")
    table = Table(f"FP8 losses of {arguments.losses} steps", header, arguments.out)
    model = sizes("eve_7b", arguments.toy, arguments.loss_layers)
    samples, length = (4, 1024) if arguments.toy else (12, 8192)
    some = partial(
        run_config, model, samples=samples, seq_length=length, data=photo_dataset(folder, model, 4 * samples),
        lr=1e-4, train_iters=arguments.losses,
    )  # fmt: skip
    exact: list[float] = []
    for name, config in runs_here(table, some):
        with table.attempt(name):
            seen = first_losses(config, arguments.losses)
            exact = exact or seen
            mean, theirs = sum(seen[-last:]) / last, sum(exact[-last:]) / last
            apart = max(abs(ours - other) for ours, other in zip(seen, exact, strict=True))
            table.add(
                name, f"{seen[0]:.4f}", f"{mean:.4f}", f"{100 * (mean / theirs - 1):+.2f} %", f"{apart:.4f}"
            )
    return table


def main() -> None:
    """Run all supported recipes and print both tables."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=8, help="decoder layers of the timed steps")
    options.add_argument("--loss-layers", type=int, default=2, help="decoder layers of the compared losses")
    options.add_argument("--losses", type=int, default=200, help="steps whose losses are compared")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.models.process_groups import process_group

    with tempfile.TemporaryDirectory() as folder, process_group(ParallelConfig()):
        failed = time_steps(arguments).close() + compare_losses(arguments, Path(folder)).close()
    exit_if_failed(failed)


if __name__ == "__main__":
    main()
