"""BF16 against FP8: time of a step, and the losses of the same 200 steps from the same weights.

    python benchmarks/gpu_fp8.py [--layers 4] [--losses 200] [--out FOLDER] [--toy]

Stage 2 of `eve_7b` at full width, without the aligning layer, on synthetic photos with random captions; every recipe
starts from the same seed and sees the same samples. What this GPU has no FP8 for is said and left out.
"""

from __future__ import annotations

from typing import Any

from gpu_common import median, parser, report, require_gpu, run_config, sizes, time_each

RECIPES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "FP8 delayed": {"fp8_format": "hybrid", "fp8_recipe": "delayed"},
    "FP8 tensorwise": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "FP8 blockwise": {"fp8_format": "e4m3", "fp8_recipe": "blockwise"},
}


def losses_and_time(config: Any, losses: int, steps: int) -> tuple[list[float], float]:
    """Language losses of the first steps, and seconds of a later one."""
    from megatron_eve.training.initialize import distributed
    from megatron_eve.training.train import setup, train_one

    with distributed(config):
        trainer = setup(config)
        found = [train_one(trainer).losses["lm loss"] for _ in range(losses)]
        seconds = time_each(lambda: train_one(trainer), steps, warm_up=0)
        trainer.loader.close()
    return found, median(seconds)


def main() -> None:
    """Run every recipe that runs here, print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="decoder layers")
    options.add_argument("--losses", type=int, default=200, help="steps whose losses are compared")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.accelerator import accelerator
    from megatron_eve.config import ConfigError
    from megatron_eve.training.kernels import check_kernels

    model = sizes("eve_7b", arguments.toy, arguments.layers)
    rows: list[tuple[object, ...]] = []
    notes, base, base_seconds = [], [0.0], 0.0
    for name, settings in RECIPES.items():
        config = run_config(
            model,
            samples=4 if arguments.toy else 12,
            seq_length=1024 if arguments.toy else 8192,
            **settings,
        )
        try:
            check_kernels(config, accelerator())
        except ConfigError as error:
            notes.append(f"Not run, {name}: {error}")
            continue
        losses, seconds = losses_and_time(config, arguments.losses, arguments.steps)
        if not settings:
            base, base_seconds = losses, seconds
        tail = max(len(losses) // 10, 1)
        apart = max(abs(ours - theirs) for ours, theirs in zip(losses, base, strict=True))
        rows.append(
            (
                name, f"{1000 * seconds:.0f}", f"{base_seconds / seconds:.2f}", f"{losses[0]:.4f}",
                f"{sum(losses[-tail:]) / tail:.4f}", f"{apart:.4f}",
            )
        )  # fmt: skip
    last = max(arguments.losses // 10, 1)
    header = (
        "precision", "ms", "speed-up", "first loss", f"mean of the last {last}", "furthest from bfloat16"
    )  # fmt: skip
    report("BF16 against FP8", header, rows, arguments.out, notes)


if __name__ == "__main__":
    main()
