"""Where the time of a training step goes, by part, from the torch profiler.

    python benchmarks/gpu_profile.py [--layers 4] [--out FOLDER] [--toy]

One warm step of stage 2 of `eve_7b` at full width, teacher and optimizer included. Two tables: kernels by kind, from
their names (attention, matrix products, communication, copies, the rest); and host ranges by part of the model (vision,
teacher, taps and aligning layer forward; the optimizer; building data). With matplotlib and --out, a picture too.
Without a GPU (--toy) operators of the CPU stand in for kernels.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_common import parser, report, require_gpu, run_config, save_teacher, sizes, synchronize

from megatron_eve.accelerator import accelerator

# Kinds of kernels by their names, the first that fits.
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("communication", r"nccl|all_reduce|all_gather|reduce_scatter"),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|mm$|matmul|linear"),
    ("copies and casts", r"memcpy|memset|copy|cast|aten::to|quantize"),
)
RANGES = ("vision", "teacher", "aligning", "optimizer", "data")


def kind(name: str) -> str:
    """What a kernel is by its name."""
    return next((found for found, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


@contextmanager
def ranges(trainer: Any) -> Iterator[dict[str, float]]:
    """Seconds inside the parts of a step while the block runs, the device waited for at both ends of each."""
    from megatron_eve.training.model import unwrap

    seconds = dict.fromkeys(RANGES, 0.0)
    chunk = unwrap(trainer.chunks[0])

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                seconds[name] += time.perf_counter() - began

        return run

    chunk.vision_model.forward = timed("vision", chunk.vision_model.forward)
    tower = trainer.teacher.tower
    tower.forward = timed("teacher", tower.forward)
    taps = [layer.tap for layer in chunk.decoder.layers if getattr(layer, "tap", None) is not None]
    for module in (chunk.input_tap, chunk.aligning_layer, *taps):
        module.forward = timed("aligning", module.forward)
    step, trainer.optimizer.step = trainer.optimizer.step, timed("optimizer", trainer.optimizer.step)
    yield seconds
    trainer.optimizer.step = step
    for module in (chunk.vision_model, tower, chunk.input_tap, chunk.aligning_layer, *taps):
        del module.forward


def data_seconds(trainer: Any) -> float:
    """Seconds that building the batches of one step takes, when nothing has prepared them."""
    done, count = trainer.progress.consumed_samples, trainer.config.training.global_batch_size
    ids = trainer.data.order(np.arange(done + 2 * count, done + 3 * count))
    began = time.perf_counter()
    for batch in trainer.loader.step_of(ids).batches:
        del batch
    return time.perf_counter() - began


def kernels(profile: Any) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of kernels (operators without a GPU) by kind."""
    on_gpu = accelerator().name == "cuda"
    found: dict[str, tuple[float, int]] = {}
    for event in profile.key_averages():
        device = str(getattr(event, "device_type", ""))
        if on_gpu != ("CUDA" in device):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total, count = found.get(kind(event.key), (0.0, 0))
        found[kind(event.key)] = (total + spent / 1000, count + event.count)
    return dict(sorted(found.items(), key=lambda pair: -pair[1][0]))


def picture(found: dict[str, tuple[float, int]], path: Path) -> None:
    """A bar for each kind of kernel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.barh(list(found), [spent for spent, _ in found.values()])
    axes.invert_yaxis()
    axes.set_xlabel("ms of a training step")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Profile a step, time its parts, print both."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="decoder layers")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.training.initialize import distributed
    from megatron_eve.training.train import setup, train_one

    model = sizes("eve_7b", arguments.toy, arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(
            model,
            samples=4 if arguments.toy else 16,
            seq_length=1024 if arguments.toy else 8192,
            teacher=save_teacher(Path(folder), model, arguments.toy),
        )
        with distributed(config):
            trainer = setup(config)
            train_one(trainer)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if accelerator().name == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as profile:
                train_one(trainer)
                synchronize()
            with ranges(trainer) as seconds:
                began = time.perf_counter()
                train_one(trainer)
                synchronize()
                whole = time.perf_counter() - began
            seconds["data"] = data_seconds(trainer)
            trainer.loader.close()
    found = kernels(profile)
    total = sum(spent for spent, _ in found.values())
    rows = [
        (name, f"{spent:.1f}", f"{100 * spent / total:.1f} %", count)
        for name, (spent, count) in found.items()
    ]
    report("kernels of a training step", ("kind", "ms", "share", "kernels"), rows, arguments.out)
    parts = [(name, f"{1000 * spent:.1f}", f"{100 * spent / whole:.1f} %") for name, spent in seconds.items()]
    report(
        "parts of a training step",
        ("part", "ms", "of a step"),
        [*parts, ("whole step", f"{1000 * whole:.1f}", "")],
        arguments.out,
        [
            "Data is what the step's batches take to build by themselves; in training that runs beside the step before."
        ],
    )
    if arguments.out is not None:
        try:
            picture(found, arguments.out / "kernels-of-a-training-step.png")
        except ImportError:
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
