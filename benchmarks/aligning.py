"""Cost of the patch aligning layer: a step with and without it, and its communication and memory at 7B.

    python benchmarks/aligning.py --steps 7

Measured, in one process without a GPU: complete training steps (stages 1 and 2, with the optimizer) of a toy decoder on
synthetic photos, in turns with the aligning layer (its intermediate features and a toy teacher) and without. Also the
bytes that autograd saves between forward and backward of one pack, and the bytes of gradients and optimizer state.

Computed from sizes: what the intermediate features of `eve_7b` and `eve_7b_hd` add to the communication between
pipeline stages and to the memory of each stage, in bfloat16, for a pack of 8,192 tokens of 640 x 480 photos with 131
text tokens each.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_eve.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.decoder.intermediate_features import features_before
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.geometry import image_geometry
from megatron_eve.runtime.command_line import command_parser_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

TOY = ModelConfig(
    num_layers=8, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, vocab_size=512,
)  # fmt: skip
TOY_VISION = EVEConfig(patch_embedding_size=128, image_size=224, teacher_size=112, teacher_hidden_size=64)
PACK = 8192
PHOTO, TEXT = (640, 480), 131
BFLOAT16 = 2


def toy_config(stage: int, teacher: Path | None, recompute: bool) -> RunConfig:
    """Configuration of a toy run on mock data."""
    full: dict[str, Any] = {
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1
    }  # fmt: skip
    return RunConfig(
        model=TOY,
        training=TrainingConfig(
            stage=stage,
            global_batch_size=8,
            train_iters=100,
            **(full if recompute else {}),
        ),
        vision=replace(
            TOY_VISION, patch_aligning=bool(teacher), teacher_model=str(teacher) if teacher else None
        ),
        optimizer=OptimizerConfig(lr=1e-5),
        data=DataConfig(mock_data=True, seq_length=1024),
    )


@contextmanager
def held_bytes() -> Iterator[dict[int, int]]:
    """Collect the storages that autograd saves inside the block, with parameters: {address: bytes}."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def measure(steps: int) -> list[tuple[str, ...]]:
    """Rows of the measured table."""
    from toy_teacher import save_toy_teacher

    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs
    from megatron_eve.training.loop.train import setup, train_one
    from megatron_eve.training.monitoring.memory import training_bytes

    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as folder, distributed(toy_config(2, None, False)):
        teacher = save_toy_teacher(Path(folder), TOY_VISION)
        for stage in (1, 2):
            for recompute in (False, True):
                trainers = {
                    aligned: setup(toy_config(stage, teacher if aligned else None, recompute))
                    for aligned in (False, True)
                }
                seconds: dict[bool, list[float]] = {False: [], True: []}
                for number in range(steps + 1):
                    for aligned, trainer in trainers.items():
                        began = time.perf_counter()
                        train_one(trainer)
                        if number:  # the first one allocates
                            seconds[aligned].append(time.perf_counter() - began)
                for aligned, trainer in trainers.items():
                    chunk = unwrap(trainer.chunks[0])
                    batch = trainer.loader.step(0).batches[0]
                    inputs = model_inputs(DevicePack(batch), chunk, trainer.target_models)
                    with held_bytes() as held:
                        losses = chunk(inputs)
                    weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
                    activations = sum(size for place, size in held.items() if place not in weights)
                    del losses
                    spent = training_bytes(trainer.chunks, trainer.optimizer, bf16=False)
                    rows.append(
                        (
                            f"stage {stage}{', full recompute' if recompute else ''}",
                            "with" if aligned else "without",
                            f"{1000 * statistics.median(seconds[aligned]):.0f} ms",
                            f"{statistics.median(seconds[aligned]) / statistics.median(seconds[False]):.2f}",
                            f"{activations / 2**20:.1f}",
                            f"{spent.gradients / 2**20:.1f}",
                            f"{spent.optimizer / 2**20:.1f}",
                        )
                    )
                    trainer.loader.close()
    return rows


def planned(preset: str, stages: int) -> list[tuple[str, ...]]:
    """Rows of the computed table for one model and pipeline size: a row each stage."""
    model, vision = PRESETS[preset]
    tap_depths = vision.tap_depths(model.num_layers)
    geometry = image_geometry(*PHOTO, vision.image_size, vision.teacher_size)
    samples = PACK / (geometry.tokens + TEXT)
    rows = samples * geometry.rows * geometry.columns / vision.pooling**2  # R
    features = rows * vision.teacher_hidden_size * BFLOAT16
    hidden = PACK * model.hidden_size * BFLOAT16
    layers = model.num_layers // stages
    rows = []
    for stage in range(stages):
        depths = range(stage * layers, (stage + 1) * layers)
        # Under full recompute each layer keeps the hidden states and the features that it was given; features are one
        # tensor until the next depth joins them.
        kept = {features_before(depth + 1, tap_depths) for depth in depths}
        flight = stages - stage  # microbatches under 1F1B
        held = sum(kept) * features
        last = stage == stages - 1
        sent = 0.0 if last else features_before((stage + 1) * layers + 1, tap_depths) * features
        rows.append(
            (
                preset,
                f"{stage + 1} of {stages}",
                "-" if last else f"{hidden / 1e6:.1f}",
                "-" if last else f"{sent / 1e6:.1f} (+{100 * sent / hidden:.0f} %)",
                f"{layers * hidden / 1e6:.0f}",
                f"{held / 1e6:.0f} (+{100 * held / (layers * hidden):.0f} %)",
                f"{flight * held / 1e6:.0f}",
            )
        )
    return rows


def show(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main() -> None:
    """Measure, compute and print the tables."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "--steps", type=int, default=7, help="steps of each kind, after one that is not counted"
    )
    arguments = parser.parse_args()
    show(
        ("run", "aligning", "step", "ratio", "held, MiB", "gradients, MiB", "optimizer, MiB"),
        measure(arguments.steps),
    )
    header = (
        "preset",
        "stage",
        "hidden, MB",
        "features sent, MB",
        "inputs kept, MB",
        "features kept, MB",
        "in flight, MB",
    )
    for preset in ("eve_7b", "eve_7b_hd"):
        for stages in (4, 8):
            show(header, planned(preset, stages))
    one = PRESETS["eve_7b"].model
    print(f"The published code keeps {one.num_layers + 1} hidden states of a pack: "
          f"{(one.num_layers + 1) * PACK * one.hidden_size * BFLOAT16 / 1e6:.0f} MB.")  # fmt: skip


if __name__ == "__main__":
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()
    main()
