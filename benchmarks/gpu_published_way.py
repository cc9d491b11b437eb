"""Forward and backward pass of the published implementation, compared with this package.

    python benchmarks/gpu_published_way.py --layers 4 --samples 48 \\
        --out tables
    python benchmarks/gpu_published_way.py --toy

The same samples and decoder layers, without optimizer, teacher and aligning layer. Published: transformers' Llama
with the fastest installed attention (padding is at the end, so causal attention needs no mask, which flash kernels do
not support), samples padded to the longest of a micro-batch of 16, images embedded one at a time (without the padded
square, which costs it less), logits of every position, all hidden states kept; with and without recomputation of
every layer, which the published runs use. Ours: packs, all images at once, logits only where there are labels, no
recomputation. Weights are bfloat16 for both (float32 for the toy on a CPU); ours accumulates gradients in float32, as
in training. Pixels are on the device before the timing starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from gpu_common import (
    median,
    parser,
    peak_memory,
    require_gpu,
    run_config,
    sizes,
    time_each,
)
from tables import Table, exit_if_failed

from megatron_eve.data.batch import PackedBatch, build_batch
from megatron_eve.data.text.conversation import IGNORE_INDEX
from megatron_eve.models.eve.hf.modeling_eve import EVEVisionTower
from megatron_eve.models.family import Preset
from megatron_eve.models.normalise import normalise
from megatron_eve.runtime.accelerator import accelerator

MICRO_BATCH = 16  # samples, as published


class PublishedWay(torch.nn.Module):
    """Patch embedding of one image at a time, projector, and transformers' Llama over a padded batch."""

    def __init__(self, sizes: Preset) -> None:
        super().__init__()
        model, vision = sizes
        from transformers import LlamaConfig, LlamaForCausalLM

        attention = "sdpa"
        if accelerator().name == "cuda" and importlib.util.find_spec("flash_attn"):
            attention = "flash_attention_2"
        self.attention = attention
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            max_position_embeddings=16384,
        )
        config._attn_implementation = attention
        self.llama = LlamaForCausalLM(config)
        self.patch_embedding = EVEVisionTower(vision.patch_embedding_size)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(vision.patch_embedding_size, model.hidden_size),
            torch.nn.GELU(),
            torch.nn.Linear(model.hidden_size, model.hidden_size),
        )

    def forward(self, samples: Sequence[PackedBatch]) -> torch.Tensor:
        """Summed loss of samples (one per `PackedBatch`), padded to the longest of them."""
        device, dtype = self.llama.device, self.llama.dtype
        longest = max(len(sample.tokens) for sample in samples)
        tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for i, sample in enumerate(samples):
            length = len(sample.tokens)
            tokens[i, :length], labels[i, :length] = sample.tokens, sample.labels
        embedded = self.llama.get_input_embeddings()(tokens.to(device)).clone()
        for i, sample in enumerate(samples):
            start = 0
            for first, (rows, columns) in zip(
                sample.image_starts.tolist(), sample.image_grids.tolist(), strict=True
            ):
                count = 4 * rows * columns
                picture = sample.pixels["patches"][start : start + count]
                visual = self.projector(self.patch_embedding(normalise(picture, dtype), [(rows, columns)]))
                embedded[i, first : first + len(visual)] = visual
                start += count
        out = self.llama(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
        # The labels are already shifted.
        return torch.nn.functional.cross_entropy(
            out.logits.flatten(0, 1).float(), labels.to(device).flatten(), reduction="sum"
        )


def published(
    sizes: Preset, dataset: Any, micro_batches: Sequence[Sequence[int]], bf16: bool, recompute: bool
) -> tuple[Callable[[], None], str]:
    """A function that runs one pass over the samples, and the name of its attention."""
    with accelerator().device:  # random numbers take a CPU seconds
        module = PublishedWay(sizes).to(torch.bfloat16 if bf16 else torch.float32)
    if recompute:
        module.llama.gradient_checkpointing_enable()
    batches = [[_build(dataset, [sample]) for sample in some] for some in micro_batches]

    def step() -> None:
        module.zero_grad()
        for samples in batches:
            module(samples).backward()

    return step, module.attention


def ours(dataset: Any, packs: Sequence[Sequence[int]], config: Any) -> Callable[[], None]:
    """A function that runs one pass over the packs, with gradients in megatron-core's float32 buffers."""
    from megatron_eve.models.build import build_chunks, unwrap
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs
    from megatron_eve.training.loop.wrap import wrap_for_training

    (chunk,) = wrap_for_training(config, build_chunks(config))
    batches = [_build(dataset, pack) for pack in packs]

    def step() -> None:
        chunk.zero_grad_buffer()
        for batch in batches:
            chunk(model_inputs(DevicePack(batch), unwrap(chunk)))["lm loss"].sum().backward()

    return step


def _build(dataset: Any, samples: Sequence[int]) -> PackedBatch:
    """A pack, its pixels on the device."""
    batch = build_batch(dataset, samples, tensor_parallel=1, context_parallel=1, views=["patches"])
    return replace(batch, pixels={"patches": batch.pixels["patches"].to(accelerator().device)})


def main() -> None:
    """Time all three and print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="decoder layers")
    options.add_argument("--samples", type=int, default=48, help="samples of a pass")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    accelerator()
    from megatron_eve.data.sampling.packing import pack_step
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.training.loop.data import open_data

    model = sizes("eve_7b", arguments.toy, arguments.layers)
    length, count = (1024, 4) if arguments.toy else (8192, arguments.samples)
    config = run_config(model, samples=count, seq_length=length, bf16=not arguments.toy)
    table = Table(
        f"the published way and ours, {count} samples",
        ("way", "ms", "samples/s", "ours over it", "real tokens", "GB"),
        arguments.out,
    )
    with distributed(config):
        dataset = open_data(config).dataset
        lengths = dataset.lengths(np.arange(count))
        packs = pack_step(lengths, length)
        with peak_memory() as memory:
            mine = median(time_each(ours(dataset, packs, config), arguments.steps, warm_up=3))
        table.add("ours", f"{1000 * mine:.0f}", f"{count / mine:.1f}", "1.00", "1.00", f"{memory[0]:.1f}")
        ids = list(range(count))
        padded = [ids[first : first + MICRO_BATCH] for first in range(0, count, MICRO_BATCH)]
        real = lengths.sum() / sum(len(some) * int(lengths[some].max()) for some in padded)
        for name, recompute in (("published", False), ("published, recomputed", True)):
            with table.attempt(name):
                with peak_memory() as memory:
                    step, attention = published(model, dataset, padded, config.training.bf16, recompute)
                    seconds = median(time_each(step, arguments.steps))
                    del step
                table.add(
                    f"{name} ({attention})", f"{1000 * seconds:.0f}", f"{count / seconds:.1f}",
                    f"{seconds / mine:.2f}", f"{real:.2f}", f"{memory[0]:.1f}",
                )  # fmt: skip
    exit_if_failed(table.close())


if __name__ == "__main__":
    main()
