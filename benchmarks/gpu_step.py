"""Training steps by preset: tokens, samples and TFLOP a second, MFU and memory of one GPU.

    python benchmarks/gpu_step.py [--layers 8] [--steps 5] [--out FOLDER] [--fp8-format hybrid] [--toy]

Whole steps (data, teacher, optimizer included) on synthetic photos, one process, packs of 8,192 tokens (16,384 for the
HD model): stage 1 at full depth with a frozen decoder; stages 2 and 3 at full width with as many layers as one GPU of
80 GB holds beside their optimizer state (--layers), since the distributed optimizer has nobody to share it with. MFU is
model FLOPs (`megatron_eve/training/flops.py`: no padding, no recomputation) over the data sheet's peak in bfloat16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gpu_common import (
    median,
    parser,
    peak_memory,
    report,
    require_gpu,
    run_config,
    save_teacher,
    share,
    sizes,
    time_each,
)

CASES = (
    # title, preset, stage, whole depth, tokens of a pack, samples
    ("stage 1, all layers, frozen", "eve_7b", 1, True, 8192, 32),
    ("stage 2", "eve_7b", 2, False, 8192, 32),
    ("stage 3, HD", "eve_7b_hd", 3, False, 16384, 16),
)


def measure(config: Any, steps: int) -> tuple[float, Any, float, float]:
    """(seconds a step, work of the last one, model TFLOP of it, GB)."""
    from megatron_eve.training.flops import model_flops, step_work
    from megatron_eve.training.initialize import model_parallel
    from megatron_eve.training.teaching import teacher_sizes
    from megatron_eve.training.train import setup, train_one

    with model_parallel(config), peak_memory() as memory:
        trainer = setup(config)
        seconds = time_each(lambda: train_one(trainer), steps)
        done = trainer.progress.consumed_samples
        ids = trainer.data.order(np.arange(done - config.training.global_batch_size, done))
        work = step_work(trainer.data.dataset, ids)
        trainer.loader.close()
    parts = model_flops(
        config.model, work, decoder_trains=config.training.stage != 1, teacher=teacher_sizes(config)
    )
    return median(seconds), work, sum(parts.values()) / 1e12, memory[0]


def main() -> None:
    """Run the cases, print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=8, help="decoder layers of stages 2 and 3")
    options.add_argument("--fp8-format", choices=("hybrid", "e4m3"), help="the decoder's matrices in FP8")
    options.add_argument("--cross-entropy-loss-fusion", action="store_true", help="TransformerEngine's loss")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.training.initialize import process_group

    extra: dict[str, Any] = {"fp8_format": arguments.fp8_format}
    if arguments.cross_entropy_loss_fusion:
        extra |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
    rows = []
    for title, preset, stage, whole, length, samples in CASES:
        model = sizes(preset, arguments.toy, None if whole else arguments.layers)
        with tempfile.TemporaryDirectory() as folder:
            config = run_config(
                model,
                samples=4 if arguments.toy else samples,
                seq_length=1024 if arguments.toy else length,
                teacher=save_teacher(Path(folder), model, arguments.toy),
                stage=stage,
                **extra,
            )
            with process_group(config.parallel):
                seconds, work, tflop, memory = measure(config, arguments.steps)
        rows.append(
            (
                title, preset, model.num_layers, f"{1000 * seconds:.0f}", f"{work.tokens / seconds:,.0f}",
                f"{config.training.global_batch_size / seconds:.2f}", f"{tflop / seconds:.1f}",
                share(tflop / seconds), f"{memory:.1f}",
            )
        )  # fmt: skip
    precision = f"FP8 ({arguments.fp8_format})" if arguments.fp8_format else "bfloat16"
    report(
        f"training steps, {precision}",
        ("run", "preset", "layers", "ms", "tokens/s", "samples/s", "TFLOP/s", "MFU", "GB"),
        rows,
        arguments.out,
    )


if __name__ == "__main__":
    main()
