"""What the perceptual loss and the discriminator cost in a step of a tower's training.

    python benchmarks/tower_step.py

In one process with random weights: complete steps of the preset vila_u_tower_tiny on random pictures of 64 pixels, in
turns with each of the losses and without. The perceptual loss is of VGG-16's size. Beside the time on the clock stand
the CPU time of all threads, which others on the machine hardly change, and the ratio that the count of FLOPs expects.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import Table

from megatron_eve.config import PRESETS, RunConfig
from megatron_eve.config.schema import TrainingConfig
from megatron_eve.models.process_groups import distributed
from megatron_eve.models.towers.perceptual import random_perceptual
from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
from megatron_eve.models.vila_u.tower_flops import pair_flops
from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
from megatron_eve.runtime.command_line import command_parser_of, whole_number
from megatron_eve.training.faults.bad_steps import start_rerun_machine
from megatron_eve.training.loop.optimizer import build_optimizer
from megatron_eve.training.tower.networks import wrap_networks
from megatron_eve.training.tower.step import TowerBatch, train_step

SIDES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip",
    "vision_config": {**SIDES, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16},
    "text_config": {**SIDES, "num_hidden_layers": 1, "vocab_size": 512, "max_position_embeddings": 16},
}
NEVER = 1 << 30


def cases(vision: TowerConfig) -> dict[str, TowerConfig]:
    """The losses of each kind of step, by name; the first is what the others are compared with."""
    plain = replace(vision, perceptual_weight=0.0, gan_start=NEVER)
    return {
        "squared error, commitment, contrast": plain,
        "and the perceptual loss": replace(plain, perceptual_weight=1.0),
        "and the adversarial one": replace(plain, gan_start=0),
        "and both": replace(plain, perceptual_weight=1.0, gan_start=0),
    }


def measure(vision: TowerConfig, pairs: int, steps: int) -> None:
    """Print the times of steps of each kind."""
    config = RunConfig(
        family="vila_u_tower", vision=vision, training=TrainingConfig(global_batch_size=pairs, train_iters=1)
    )
    with distributed(config):
        start_rerun_machine(config.faults)
        tower = VILAUTrainableTower(tower_settings(vision), SIGLIP["text_config"])
        networks = wrap_networks(config, tower, random_perceptual(0, width=64), vision)
        optimizer = build_optimizer(config, networks.chunks, per_network=True)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (pairs, 64, 64, 3), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(2, 512, (pairs, 16), generator=generator)
        wall, cpu = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for number in range(steps + 1):
            for name, settings in cases(vision).items():
                clock, process = time.perf_counter(), time.process_time()
                train_step(networks, optimizer, settings, TowerBatch(pixels, tokens, pairs, number, 0))
                if number:  # the first one allocates
                    wall[name].append(time.perf_counter() - clock)
                    cpu[name].append(time.process_time() - process)
    table = Table("step of a tower", ("losses", "ms", "CPU ms", "CPU time", "FLOPs"), None)
    first, flops = next(iter(cpu)), {name: pair_flops(one, 0) for name, one in cases(vision).items()}
    for name in cpu:
        table.add(
            name,
            f"{1000 * statistics.median(wall[name]):.0f}",
            f"{1000 * statistics.median(cpu[name]):.0f}",
            f"{statistics.median(cpu[name]) / statistics.median(cpu[first]):.2f}",
            f"{flops[name] / flops[first]:.2f}",
        )
    table.note(f"{pairs} pairs a step, medians of {steps} steps, {torch.get_num_threads()} threads")
    table.close()


def main() -> None:
    """Measure, and print the table."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--pairs", type=whole_number(2), default=16, metavar="N", help="pairs of a step")
    parser.add_argument(
        "--steps", type=whole_number(1), default=5, metavar="N",
        help="steps of each kind, after one that is not counted",
    )  # fmt: skip
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SIGLIP), encoding="utf-8")
        measure(replace(PRESETS["vila_u_tower_tiny"].vision, vision_tower=folder), flags.pairs, flags.steps)


if __name__ == "__main__":
    main()
