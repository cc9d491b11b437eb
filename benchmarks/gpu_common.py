"""Shared code of the GPU benchmarks: configurations, data, timing and memory. Not a benchmark."""

from __future__ import annotations

import argparse
import gc
import io
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tables import TableRow

from megatron_eve.config import (
    PRESETS,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
    validate,
)
from megatron_eve.models.family import Preset
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.command_line import command_parser_of

# TransformerEngine compiles kernels with CUDA's headers, which are not always where it looks.
if "CUDA_HOME" not in os.environ and (compiler := shutil.which("nvcc")):
    os.environ["CUDA_HOME"] = str(Path(compiler).resolve().parents[1])
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

# Peak of dense bfloat16 matrix products in TFLOP/s, from data sheets, by a part of the GPU's name; the first match
# counts. For other GPUs no MFU is printed.
_PEAK = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)


def parser(text: str | None) -> argparse.ArgumentParser:
    """Argument parser with the options that all GPU benchmarks share."""
    found = command_parser_of(text)
    found.add_argument("--toy", action="store_true", help="tiny sizes, to check that it runs; works on a CPU")
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write the tables to (default: none)"
    )
    found.add_argument("--steps", type=int, default=5, help="timed steps")
    return found


def require_gpu(toy: bool) -> None:
    """Exit with a message if there is no GPU, unless `toy`."""
    if not toy and accelerator().name != "cuda":
        sys.exit("error: needs a CUDA GPU at these sizes; --toy runs on a CPU")


def sizes(preset: str, toy: bool, layers: int | None = None) -> Preset:
    """A preset with at most `layers` layers; with `toy`, a tiny model of the same structure."""
    model, vision = PRESETS[preset]
    if toy:
        scale = vision.image_size // 672
        model, vision = PRESETS["eve_tiny"]
        model, vision = replace(model, vocab_size=512), replace(vision, image_size=224 * scale)
    return Preset(replace(model, num_layers=min(layers or model.num_layers, model.num_layers)), vision)


def run_config(
    model: Preset,
    *,
    samples: int,
    seq_length: int,
    teacher: Path | None = None,
    data: str | None = None,
    parallel: ParallelConfig | None = None,
    bf16: bool = True,
    lr: float = 1e-5,
    train_iters: int = 10_000,
    **training: Any,
) -> RunConfig:
    """A validated configuration of a run on a dataset, or on synthetic samples (--mock-data)."""
    config = RunConfig(
        parallel=parallel or ParallelConfig(),
        model=model.model,
        training=TrainingConfig(global_batch_size=samples, train_iters=train_iters, bf16=bf16, **training),
        vision=replace(
            model.vision, patch_aligning=teacher is not None, teacher_model=str(teacher) if teacher else None
        ),
        optimizer=OptimizerConfig(lr=lr),
        data=DataConfig(
            mock_data=data is None,
            data_path=(data,) if data else (),
            seq_length=seq_length,
            num_workers=min(8, os.cpu_count() or 1),
        ),
    )
    validate(config, 1)
    return config


def photos(count: int, width: int, height: int) -> list[bytes]:
    """JPEG files (quality 90) with edges, gradients and noise as in photos; deterministic."""
    files = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), dtype=np.int32)
        pixels = smooth + random.normal(0, 6, smooth.shape)
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def photo_dataset(folder: Path, model: Preset, samples: int) -> str:
    """Write a dataset of photos of common sizes with random captions; returns its prefix.

    Token lengths and aspect ratios are those of --mock-data, whose images are smaller.
    """
    from megatron_eve.data.format.indexed import DatasetWriter, StoredImage
    from megatron_eve.data.format.manifest import DatasetSettings
    from megatron_eve.data.mock import PHOTO_SHAPES, MockDataset
    from megatron_eve.models.registry import image_planner

    mock = MockDataset(
        samples,
        vocab_size=model.model.vocab_size,
        planner=image_planner(RunConfig(model=model.model, vision=model.vision)),
        seq_length=16384,
        seed=0,
    )
    shapes = [(4 * width, 4 * height) for width, height in PHOTO_SHAPES]
    stored = {
        (width, height): [StoredImage(data, width, height) for data in photos(4, width, height)]
        for width, height in shapes
    }
    settings = DatasetSettings(
        template="plain",
        family=RunConfig().family,
        image_settings={"image_size": model.vision.image_size, "teacher_size": model.vision.teacher_size},
        model_max_length=16384,
        apply_exif=False,
        max_pixels=1 << 24,
        tokenizer_sha256="",
        vocab_size=model.model.vocab_size,
    )
    prefix = str(folder / "photos")
    with DatasetWriter(prefix, settings) as writer:
        for sample in range(samples):
            images = []
            if mock.samples["num_images"][sample]:
                image = mock.images[mock.samples["first_image"][sample]]
                images.append(stored[4 * image["width"], 4 * image["height"]][sample % 4])
            writer.add_sample(*mock.text(sample), images)
        writer.finalise()
    return prefix


def save_teacher(folder: Path, model: Preset, toy: bool) -> Path:
    """Save a vision tower with random weights, once: of the sizes of CLIP ViT-L/14-336, or of the toy model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if toy:
        from toy_teacher import save_toy_teacher

        return save_toy_teacher(folder, model.vision)
    if folder.exists():
        return folder
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with accelerator().device:  # drawing the weights takes seconds on a CPU
        CLIPVisionModel(tower).bfloat16().save_pretrained(folder)
    return folder


def synchronize() -> None:
    """Wait until the device has finished all queued work."""
    if accelerator().name == "cuda":
        torch.cuda.synchronize()


def time_each(
    step: Callable[[], object], count: int, warm_up: int = 2, begin: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each of `count` calls, synchronised with the device.

    `warm_up` calls that are not counted come first, then a call of `begin`.
    """
    seconds = []
    for number in range(warm_up + count):
        if number == warm_up:
            begin()
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - began)
    return seconds


def median(values: Sequence[float]) -> float:
    """Median of some values."""
    return statistics.median(values)


@dataclass(frozen=True)
class Measured:
    """Measurements of some training steps.

    Attributes:
        seconds: median time of a step.
        tokens, samples, tflop: per second, over all timed steps together, since steps hold different samples; tflop
            counts model FLOPs.
        waited: fraction of the time for which the host waited for data; the GPU may have been busy meanwhile.
        memory: peak memory of tensors, GB.
    """

    seconds: float
    tokens: float
    samples: float
    tflop: float
    waited: float
    memory: float


def first_losses(config: RunConfig, count: int) -> list[float]:
    """Language losses of the first steps of a run. Call it inside `process_group`."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        found = [train_one(trainer).losses["lm loss"] for _ in range(count)]
        trainer.loader.close()
    return found


def measure(config: RunConfig, steps: int) -> Measured:
    """Time training steps of a run, with data, teacher and optimizer. Call it inside `process_group`."""
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one
    from megatron_eve.training.monitoring.flops import model_flops, step_work

    with model_parallel(config), peak_memory() as memory, data_waits() as waits:
        trainer = setup(config)
        # Three warm-up steps: torch compiles the loss and the activation for one length, then for any length.
        seconds = time_each(lambda: train_one(trainer), steps, warm_up=3, begin=waits.clear)
        done, count = trainer.train_state.consumed_samples, config.training.global_batch_size
        ids = trainer.data.order(np.arange(done - steps * count, done))
        work = step_work(trainer.data.dataset, ids)
        trainer.loader.close()
    flops = model_flops(config, work)
    whole = sum(seconds)
    return Measured(
        seconds=median(seconds),
        tokens=work.tokens / whole,
        samples=len(ids) / whole,
        tflop=sum(flops.values()) / 1e12 / whole,
        waited=sum(waits) / whole,
        memory=memory[0],
    )


@contextmanager
def data_waits() -> Iterator[list[float]]:
    """Collect the seconds that this thread waited for each batch inside the block."""
    from megatron_eve.data.sampling.loader import LazyBatches

    found: list[float] = []
    original = LazyBatches.__getitem__

    def timed(self: LazyBatches, index: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(self, index)
        finally:
            found.append(time.perf_counter() - began)

    LazyBatches.__getitem__ = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        LazyBatches.__getitem__ = original  # type: ignore[method-assign]


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure the peak memory of tensors inside the block, in GB, as the only item of the list; 0 without a GPU."""
    found: list[float] = []
    gc.collect()  # earlier objects may be kept by reference cycles
    if accelerator().name == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated() / 1e9 if accelerator().name == "cuda" else 0.0)


def peak_tflops() -> float | None:
    """Peak bfloat16 TFLOP/s of the GPU from its data sheet; None if unknown."""
    if accelerator().name != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK if part in name), None)


def share(tflops: float) -> str:
    """TFLOP/s as a share of the peak (MFU)."""
    peak = peak_tflops()
    return "" if peak is None else f"{100 * tflops / peak:.1f} %"


STEP_HEADER = ("ms", "tokens/s", "samples/s", "TFLOP/s", "MFU", "data wait", "GB")


def step_columns(found: Measured) -> TableRow:
    """Table columns of a measurement, in the order of `STEP_HEADER`."""
    return (
        f"{1000 * found.seconds:.0f}", f"{found.tokens:,.0f}", f"{found.samples:.2f}", f"{found.tflop:.1f}",
        share(found.tflop), f"{100 * found.waited:.2f} %", f"{found.memory:.1f}",
    )  # fmt: skip
