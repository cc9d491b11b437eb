"""Smoke test of a machine, two minutes: imports, attention over one pack, training steps.

    python benchmarks/gpu_smoke.py --out tables
    python benchmarks/gpu_smoke.py --toy

Compares the attention that a run would use here (TransformerEngine's on a GPU) with float32 SDPA, sample by sample.
Then runs steps of a four-layer model of full width with the aligning layer, in bfloat16 and, where supported, in FP8,
and prints their losses.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_common import (
    first_losses,
    parser,
    require_gpu,
    run_config,
    save_teacher,
    sizes,
)
from tables import Table, exit_if_failed, machine_rows

from megatron_eve.config import ConfigError, ParallelConfig
from megatron_eve.runtime.accelerator import accelerator

LENGTHS = [512, 300, 1, 187]  # tokens of the samples of the pack


def attention_error(config: Any) -> float:
    """Largest difference of a packed attention from float32 SDPA, sample by sample."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.decoder.packed import packed_params

    (chunk,) = build_chunks(config)
    attention = chunk.decoder.layers[0].self_attention.core_attention
    heads = config.model.num_attention_heads
    shape = (sum(LENGTHS), heads, config.model.hidden_size // heads)
    device, dtype = accelerator().device, torch.bfloat16 if config.training.bf16 else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    found = attention(
        query, key, value, None,
        attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packed_params(bounds, LENGTHS),
    )  # fmt: skip
    pieces = zip(*(x.float().split(LENGTHS) for x in (query, key, value)), strict=True)
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
        ).transpose(0, 1)
        for q, k, v in pieces
    ]
    return float((found.float().view(shape) - torch.cat(expected)).abs().max())


def main() -> None:
    """Run all checks and print the results."""
    arguments = parser(__doc__).parse_args()
    require_gpu(arguments.toy)
    machine = Table("machine", ("what", ""), arguments.out)
    for row in machine_rows():
        machine.add(*row)
    from megatron_eve.models.kernels import check_kernels, describe_kernels
    from megatron_eve.models.process_groups import model_parallel, process_group

    model = sizes("eve_7b", arguments.toy, 4)  # the second depth of the aligning layer needs 4 layers
    length = 1024 if arguments.toy else 8192
    table = Table("smoke test", ("what", "found"), arguments.out)
    right = []
    with tempfile.TemporaryDirectory() as folder, process_group(ParallelConfig()):
        with table.attempt("packed attention"):
            config = run_config(model, samples=4, seq_length=length)
            with model_parallel(config):
                error = attention_error(config)
            # Attention outputs are means of standard normal numbers; bfloat16 has 8 significant bits.
            right.append(error < 0.05)
            table.add("packed attention, largest difference from float32", f"{error:.4f}")
        teacher = save_teacher(Path(folder) / "teacher", model, arguments.toy)
        precisions: dict[str, Any] = {
            "bfloat16": {},
            "FP8": {"fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
        }
        table.add("loss of guessing", f"{math.log(model.model.vocab_size):.3f}")
        for name, settings in precisions.items():
            config = run_config(model, samples=4, seq_length=length, teacher=teacher, **settings)
            try:
                check_kernels(config, accelerator())
            except ConfigError as error:
                table.note(f"Not run, {name}: {error}")
                continue
            with table.attempt(name):
                losses = first_losses(config, 2)
                right.append(all(math.isfinite(loss) for loss in losses))
                table.add(f"losses of two steps, {name}", ", ".join(f"{loss:.3f}" for loss in losses))
                table.note(f"{name}: {describe_kernels(config)}.")
    table.add("result", "passed" if right and all(right) else "FAILED")
    failed = table.close()
    exit_if_failed(failed if all(right) else [*failed, "see the result"])


if __name__ == "__main__":
    main()
