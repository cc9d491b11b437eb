"""Training steps by preset: tokens, samples and TFLOP a second, MFU, wait for data, and memory of one GPU.

    python benchmarks/gpu_step.py [--layers 8] [--steps 5] [--out FOLDER] [--fp8-format hybrid] [--toy]

Whole steps (data, teacher, optimizer included) on a dataset of photos on disk, one process, packs of 8,192 tokens
(16,384 for the HD model), four to seven of them a step: stage 1 at full depth with a frozen decoder; stages 2 and 3 at
full width with as many layers as one GPU of 80 GB holds beside their optimizer state (--layers), since the distributed
optimizer has nobody to share it with. MFU is model FLOPs (`megatron_eve/training/flops.py`: no padding, no
recomputation) over the data sheet's peak in bfloat16. The wait for data is the host's, which the GPU need not notice.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gpu_common import (
    STEP_HEADER,
    Table,
    leave,
    measure,
    parser,
    photo_dataset,
    require_gpu,
    run_config,
    save_teacher,
    sizes,
    step_columns,
)

from megatron_eve.config import ParallelConfig
from megatron_eve.config.validate import dali_is_installed

CASES = (
    # title, preset, stage, whole depth, tokens of a pack, samples
    ("stage 1, all layers, frozen", "eve_7b", 1, True, 8192, 54),
    ("stage 2", "eve_7b", 2, False, 8192, 96),
    ("stage 3, HD", "eve_7b_hd", 3, False, 16384, 32),
)


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
    precision = f"FP8 ({arguments.fp8_format})" if arguments.fp8_format else "bfloat16"
    table = Table(f"training steps, {precision}", ("run", "preset", "layers", *STEP_HEADER), arguments.out)
    with tempfile.TemporaryDirectory() as folder, process_group(ParallelConfig()):
        for title, preset, stage, whole, length, samples in CASES:
            model = sizes(preset, arguments.toy, None if whole else arguments.layers)
            name = f"toy-{preset}" if arguments.toy else "clip"
            config = run_config(
                model,
                samples=4 if arguments.toy else samples,
                seq_length=1024 if arguments.toy else length,
                teacher=save_teacher(Path(folder) / name, model, arguments.toy),
                data=photo_dataset(Path(folder) / preset, model, 16 if arguments.toy else 432),
                stage=stage,
                **extra,
            )
            with table.attempt(title):
                table.add(title, preset, model.num_layers, *step_columns(measure(config, arguments.steps)))
    decoder = "DALI" if dali_is_installed() else "threads, since DALI is not installed"
    table.note(f"Images are decoded by {decoder}.")
    leave(table.close())


if __name__ == "__main__":
    main()
