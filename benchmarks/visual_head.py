"""What the head of the visual loss costs in training: peak bytes by chunk, and tokens per second with and without it.

    python benchmarks/visual_head.py

In one process with random weights. Memory: live bytes of tensors at their peak in forward and backward of the head
alone, with --visual-loss-chunk at several sizes, against those of a chunk's logits, chunk x D x K x 4. Speed: complete
training steps on mock data, in turns with pictures that are drawn and with the same pictures only read, and the ratio
that the count of FLOPs expects.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_eve.config import RunConfig
from megatron_eve.config.recipe import parse
from megatron_eve.data.sampling.loader import Step
from megatron_eve.models.build import transformer_config
from megatron_eve.models.process_groups import distributed
from megatron_eve.models.vila_u.visual_head import VisualHead, VisualHeadInputs
from megatron_eve.runtime.command_line import command_parser_of
from megatron_eve.training.loop.loss import Normalizer, objectives_of
from megatron_eve.training.loop.step import train_step
from megatron_eve.training.loop.train import setup
from megatron_eve.training.monitoring.flops import model_flops, step_work

FLAGS = [
    "--family",
    "vila_u",
    "--preset",
    "vila_u_tiny",
    "--mock-data",
    "--train-iters",
    "100",
    "--lr",
    "1e-4",
]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, until they are freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if torch.is_tensor(one):
                storage = one.untyped_storage()
                if storage._cdata not in self._seen | given and storage.nbytes():
                    self._seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def head_config(depth: int, codebook_size: int, chunk: int | None) -> RunConfig:
    """A small decoder with a head of these sizes, without dropout."""
    config = parse(FLAGS)
    vision = replace(
        config.vision,
        codes_per_position=depth,
        visual_codebook_size=codebook_size,
        visual_loss_chunk=chunk,
        depth_dropout=0.0,
    )
    return replace(config, vision=vision)


def peak_bytes(config: RunConfig, positions: int) -> int:
    """Peak live bytes of forward and backward of the head, over those of its weights and inputs."""
    torch.manual_seed(0)
    head, vision = VisualHead(transformer_config(config), config.vision), config.vision
    hidden = torch.randn(positions, 1, config.model.hidden_size, requires_grad=True)
    codes = torch.randint(0, vision.visual_codebook_size, (positions, vision.codes_per_position))
    inputs = VisualHeadInputs(torch.arange(positions), codes)
    with LiveBytes() as live:
        head(hidden, None, None, inputs).sum().backward()
    return live.peak


def speed_config() -> RunConfig:
    """A decoder of 8 layers and a head of 6, whose costs are as those of `vila_u_7b` at D 4."""
    config = head_config(4, 2048, 256)
    model = replace(config.model, num_layers=8, hidden_size=512, ffn_hidden_size=1376, num_attention_heads=8)
    vision = replace(
        config.vision, code_grid=8, depth_hidden_size=160, depth_num_layers=6, depth_num_attention_heads=4
    )
    data = replace(config.data, seq_length=1024)
    return replace(config, model=model, vision=vision, data=data)


def only_read(step: Step) -> Step:
    """The same packs, in which no picture is drawn."""
    batches = [replace(batch, drawn=torch.zeros_like(batch.drawn)) for batch in step.batches]
    return replace(step, batches=batches, num_visual_labels=0)


def measure_steps(steps: int) -> None:
    """Print the times of steps of both kinds."""
    config = speed_config()
    trainer = setup(config)
    objectives = objectives_of(config)
    size = config.training.global_batch_size
    work = step_work(trainer.data.dataset, trainer.loader.step(0, size).sample_ids)
    kinds: dict[str, Callable[[Step], Step]] = {"drawn": lambda step: step, "only read": only_read}
    flops = {"drawn": work, "only read": replace(work, visual_labels=0)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(steps + 1):
        for kind, change in kinds.items():
            step = change(trainer.loader.step(0, size))
            began = time.perf_counter()
            train_step(trainer.chunks, trainer.optimizer, step, Normalizer.of(step, objectives))
            if number:  # the first one allocates
                seconds[kind].append(time.perf_counter() - began)
    median = {kind: statistics.median(found) for kind, found in seconds.items()}
    counted = {kind: sum(model_flops(config, found).values()) for kind, found in flops.items()}
    print(
        f"\n{work.tokens} tokens a step, of which {work.visual_labels} positions are drawn, {steps} steps\n"
    )
    print("| pictures | ms a step | tokens/s | time | FLOPs |\n|---|---|---|---|---|")
    for kind, found in median.items():
        print(
            f"| {kind} | {1000 * found:.0f} | {work.tokens / found:.0f} | {found / median['only read']:.2f} | "
            f"{counted[kind] / counted['only read']:.2f} |"
        )
    trainer.loader.close()


def measure_memory(depth: int, codebook_size: int, positions: int, chunks: list[int]) -> None:
    """Print peaks of the head by chunk."""
    print(f"{positions} positions, D {depth}, K {codebook_size}\n")
    print("| chunk | peak, MiB | logits of a chunk, MiB | peak over those |\n|---|---|---|---|")
    for chunk in (*chunks, None):
        peak = peak_bytes(head_config(depth, codebook_size, chunk), positions)
        logits = min(chunk or positions, positions) * depth * codebook_size * 4
        print(f"| {chunk or 'all'} | {peak / 2**20:.1f} | {logits / 2**20:.1f} | {peak / logits:.2f} |")


def main() -> None:
    """Measure, and print both tables."""
    parser = command_parser_of(__doc__)
    parser.add_argument("--depth", type=int, default=16, help="D of the memory table")
    parser.add_argument("--codebook-size", type=int, default=4096, help="K of the memory table")
    parser.add_argument(
        "--positions", type=int, default=512, help="positions that are drawn, of the memory table"
    )
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256], help="positions at a time")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of each kind, after one that is not counted"
    )
    flags = parser.parse_args()
    with distributed(head_config(flags.depth, flags.codebook_size, None)):
        measure_memory(flags.depth, flags.codebook_size, flags.positions, flags.chunks)
        measure_steps(flags.steps)


if __name__ == "__main__":
    main()
