"""Does this machine run it at all? Imports, one attention over a pack, one training step; two minutes.

    python benchmarks/gpu_smoke.py [--out FOLDER] [--toy]

The attention of the layers that a run would take here (TransformerEngine's on a GPU) against float32 SDPA sample by
sample; then one step of a two-layer model of full width, in bfloat16, and its loss.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_common import machine_rows, parser, report, require_gpu, run_config, save_teacher, sizes

from megatron_eve.accelerator import accelerator

LENGTHS = [512, 300, 1, 187]  # of the samples of a pack


def attention_error(config: Any) -> float:
    """Largest difference of a packed attention from float32 SDPA, sample by sample."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_eve.models.decoder.packed import packed_params
    from megatron_eve.training.model import build_chunks

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
            *(x.transpose(0, 1) for x in piece), is_causal=True
        ).transpose(0, 1)
        for piece in pieces
    ]
    return float((found.float().view(shape) - torch.cat(expected)).abs().max())


def main() -> None:
    """Check one thing after the other, and say what came of it."""
    arguments = parser(__doc__).parse_args()
    require_gpu(arguments.toy)
    report("machine", ("what", ""), machine_rows(), arguments.out)
    from megatron_eve.training.initialize import distributed
    from megatron_eve.training.kernels import describe_kernels
    from megatron_eve.training.train import setup, train_one

    model = sizes("eve_7b", arguments.toy, 2 if not arguments.toy else None)
    length = 1024 if arguments.toy else 8192
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(model, samples=4, seq_length=length)
        with distributed(config):
            error = attention_error(config)
        if model.num_layers < model.tap_interval:
            aligned = config
        else:
            teacher = save_teacher(Path(folder), model, arguments.toy)
            aligned = run_config(model, samples=4, seq_length=length, teacher=teacher)
        with distributed(aligned):
            trainer = setup(aligned)
            losses = [train_one(trainer).losses["lm loss"] for _ in range(2)]
            trainer.loader.close()
    # A value of attention is a mean of normal numbers; bfloat16 has 8 bits.
    fine = error < 0.05 and all(math.isfinite(loss) for loss in losses)
    uniform = math.log(model.vocab_size)
    rows = [
        ("kernels", describe_kernels(aligned)),
        ("packed attention, largest difference from float32", f"{error:.4f}"),
        ("losses of two steps", ", ".join(f"{loss:.3f}" for loss in losses)),
        ("loss of guessing", f"{uniform:.3f}"),
        ("verdict", "fine" if fine else "WRONG"),
    ]
    report("smoke test", ("what", "found"), rows, arguments.out)
    if not fine:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
