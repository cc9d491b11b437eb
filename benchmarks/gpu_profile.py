"""Time of a training step by kind of kernel (torch profiler) and by part of the model.

    python benchmarks/gpu_profile.py --layers 4 --out tables
    python benchmarks/gpu_profile.py --toy

Two steps of stage 2 of `eve_7b` at full width, with teacher and optimizer, after warm-up. Prints two tables and, with
matplotlib and --out, draws a chart of both. Kernels are grouped by name: attention, matrix products, communication,
copies, other. Parts of the model are timed with the device synchronised around each: vision, decoder (with the
intermediate features), output layer and loss, aligning layer and teacher forward, backward pass, optimizer, wait for
data, the rest. Without a GPU (--toy), CPU operators are counted in place of kernels.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_common import (
    parser,
    photo_dataset,
    require_gpu,
    run_config,
    save_teacher,
    sizes,
    synchronize,
)
from tables import Table

from megatron_eve.data.sampling.loader import LazyBatches
from megatron_eve.runtime.accelerator import accelerator

# Kinds of kernels and patterns of their names; the first match counts.
KINDS = (
    ("attention", r"flash|fmha|fused_attn|attention|sdpa"),
    ("communication", r"nccl|all_reduce|all_gather|reduce_scatter"),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|mm$|matmul|linear"),
    ("copies and casts", r"memcpy|memset|copy|cast|aten::to|quantize"),
)
PARTS = (
    "vision",
    "decoder",
    "output and loss",
    "aligning layer",
    "teacher",
    "backward",
    "optimizer",
    "data wait",
)


def kind(name: str) -> str:
    """Kind of a kernel, from its name."""
    return next((found for found, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


@contextmanager
def parts(trainer: Any) -> Iterator[dict[str, float]]:
    """Measure the seconds in each part of a step inside the block, synchronising the device around each part."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_eve.models.build import unwrap
    from megatron_eve.models.decoder import model

    seconds = dict.fromkeys(PARTS, 0.0)
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

    places = (
        ("vision", chunk.vision_model, "forward"),
        ("decoder", chunk.decoder, "forward"),
        ("output and loss", chunk.output_layer, "forward"),
        ("output and loss", model, "language_losses"),
        ("aligning layer", chunk.aligning_layer, "forward"),
        ("teacher", trainer.target_models["align loss"].teacher.tower, "forward"),
        ("backward", schedules, "backward_step"),
        ("optimizer", trainer.optimizer, "step_with_ready_grads"),
        ("data wait", LazyBatches, "__getitem__"),
    )
    with ExitStack() as stack:
        for name, holder, attribute in places:
            stack.enter_context(patch.object(holder, attribute, timed(name, getattr(holder, attribute))))
        yield seconds


def kernels(profile: Any) -> dict[str, tuple[float, int]]:
    """Milliseconds and number of kernels by kind (of CPU operators without a GPU)."""
    on_gpu = accelerator().name == "cuda"
    found: dict[str, tuple[float, int]] = {}
    for event in profile.key_averages():
        device = str(getattr(event, "device_type", ""))
        # Annotated ranges of torch (optimizer, compiled functions) also have device times, but are not kernels.
        if on_gpu != ("CUDA" in device) or getattr(event, "is_user_annotation", False):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total, count = found.get(kind(event.key), (0.0, 0))
        found[kind(event.key)] = (total + spent / 1000, count + event.count)
    return dict(sorted(found.items(), key=lambda pair: -pair[1][0]))


def picture(kinds: dict[str, float], times: dict[str, float], path: Path) -> None:
    """Draw bar charts of the kinds of kernels and of the parts, in ms."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 3.2))
    for axes, title, found in zip(both, ("kernels", "parts"), (kinds, times), strict=True):
        axes.barh(list(found), list(found.values()))
        axes.invert_yaxis()
        axes.set_title(f"A training step by {title}")
        axes.set_xlabel("ms")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def profiled(trainer: Any) -> dict[str, tuple[float, int]]:
    """Kernels of one step."""
    from megatron_eve.training.loop.train import train_one

    activities = [torch.profiler.ProfilerActivity.CPU]
    if accelerator().name == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        train_one(trainer)
        synchronize()
    return kernels(profile)


def main() -> None:
    """Profile one step, time the parts of another, and print both tables."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="decoder layers")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.train import setup, train_one

    model = sizes("eve_7b", arguments.toy, arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(
            model,
            samples=4 if arguments.toy else 54,
            seq_length=1024 if arguments.toy else 8192,
            teacher=save_teacher(Path(folder) / "teacher", model, arguments.toy),
            data=photo_dataset(Path(folder), model, 16 if arguments.toy else 432),
        )
        with distributed(config):
            trainer = setup(config)
            for _ in range(3):
                train_one(trainer)
            found = profiled(trainer)
            with parts(trainer) as seconds:
                synchronize()
                began = time.perf_counter()
                train_one(trainer)
                synchronize()
                whole = time.perf_counter() - began
            trainer.loader.close()
    seconds["the rest"] = whole - sum(seconds.values())
    total = sum(spent for spent, _ in found.values())
    table = Table("kernels of a training step", ("kind", "ms", "share", "kernels"), arguments.out)
    for name, (spent, count) in found.items():
        table.add(name, f"{spent:.1f}", f"{100 * spent / total:.1f} %", count)
    table.close()
    table = Table("parts of a training step", ("part", "ms", "share"), arguments.out)
    for name, spent in [*seconds.items(), ("whole step", whole)]:
        table.add(name, f"{1000 * spent:.1f}", f"{100 * spent / whole:.1f} %")
    table.note("The device is synchronised around each part, so this step is slower than others.")
    table.close()
    if arguments.out is not None:
        milliseconds = {name: 1000 * spent for name, spent in seconds.items()}
        try:
            picture(
                {name: spent for name, (spent, _) in found.items()},
                milliseconds,
                arguments.out / "a-training-step.png",
            )
        except ImportError:
            print("no picture: matplotlib is not installed")


if __name__ == "__main__":
    main()
