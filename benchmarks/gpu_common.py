"""What the GPU benchmarks share: runs, clocks, the machine they ran on, and tables. Nothing here is a benchmark."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_eve.accelerator import accelerator
from megatron_eve.config import (
    PRESETS,
    AlignmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    validate,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

# Dense matrix products in bfloat16, TFLOP/s, by what the name of a GPU holds (its makers' data sheets); the first that
# fits. Others have no MFU.
_PEAK = (
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
)

Row = Sequence[object]


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options that every GPU benchmark has."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs; on a CPU too")
    found.add_argument("--out", type=Path, help="folder to write the tables into, too")
    found.add_argument("--steps", type=int, default=5, help="timed steps")
    return found


def require_gpu(toy: bool) -> None:
    """Leave with a message where the sizes asked for want a GPU that is not there."""
    if not toy and accelerator().name != "cuda":
        sys.exit("error: needs a CUDA GPU at these sizes; --toy runs on a CPU")


def sizes(preset: str, toy: bool, layers: int | None = None) -> ModelConfig:
    """A preset, with fewer layers if asked; as a toy of its shape."""
    model = PRESETS[preset]
    if toy:
        scale = model.image_size // 672
        model = replace(PRESETS["eve_tiny"], image_size=224 * scale, vocab_size=512)
    return replace(model, num_layers=min(layers or model.num_layers, model.num_layers))


def run_config(
    model: ModelConfig,
    *,
    samples: int,
    seq_length: int,
    teacher: Path | None = None,
    bf16: bool = True,
    **training: Any,
) -> RunConfig:
    """A run on synthetic photos and random captions, checked as any run is."""
    config = RunConfig(
        model=model,
        training=TrainingConfig(global_batch_size=samples, train_iters=10_000, bf16=bf16, **training),
        alignment=AlignmentConfig(
            patch_aligning=teacher is not None, teacher_model=str(teacher) if teacher else None
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        data=DataConfig(mock_data=True, seq_length=seq_length, num_workers=8),
    )
    validate(config, 1)
    return config


def save_teacher(folder: Path, model: ModelConfig, toy: bool) -> Path:
    """A vision tower of random weights: CLIP ViT-L/14-336's sizes, or the toy's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if toy:
        from toy_teacher import save_toy_teacher

        return save_toy_teacher(folder, model)
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    CLIPVisionModel(tower).to(torch.bfloat16).save_pretrained(folder)
    return folder


def synchronize() -> None:
    """Wait for what the device was told to do."""
    if accelerator().name == "cuda":
        torch.cuda.synchronize()


def time_each(step: Callable[[], object], count: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of `count` calls, after some that are not counted; the device is waited for."""
    seconds = []
    for number in range(warm_up + count):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - began)
    return seconds


def median(values: Sequence[float]) -> float:
    """Their median."""
    return statistics.median(values)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Most memory of tensors inside the block, in GB, as the only item of the list; 0 without a GPU."""
    found: list[float] = []
    if accelerator().name == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated() / 1e9 if accelerator().name == "cuda" else 0.0)


def peak_tflops() -> float | None:
    """What the GPU could do in bfloat16 by its data sheet; None if it is not among those known."""
    if accelerator().name != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK if part in name), None)


def share(tflops: float) -> str:
    """TFLOP/s as a share of the peak (MFU)."""
    peak = peak_tflops()
    return "" if peak is None else f"{100 * tflops / peak:.1f} %"


def machine_rows() -> list[Row]:
    """What the numbers were measured on."""
    rows: list[Row] = [("device", accelerator().name), ("torch", torch.__version__)]
    if accelerator().name == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows += [
            ("GPU", properties.name),
            ("memory, GB", f"{properties.total_memory / 1e9:.1f}"),
            ("CUDA", torch.version.cuda or ""),
            ("cuDNN", torch.backends.cudnn.version() or ""),
        ]
    for package in ("megatron-core", "transformer-engine", "flash-attn", "transformers"):
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def report(
    title: str, header: Sequence[str], rows: Sequence[Row], out: Path | None, notes: Sequence[str] = ()
) -> None:
    """Print a Markdown table under its title, and write it to OUT/title.md with the machine below it."""
    text = f"## {title}\n\n{_table(header, rows)}\n" + "".join(f"\n{note}\n" for note in notes)
    print(text, flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = "-".join(title.lower().replace(",", "").split())
        machine = _table(("machine", ""), machine_rows())
        (out / f"{name}.md").write_text(f"{text}\n{machine}\n", encoding="utf-8")


def _table(header: Sequence[str], rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
