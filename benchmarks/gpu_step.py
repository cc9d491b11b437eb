"""Training steps by preset: tokens/s, samples/s, TFLOP/s, MFU, wait for data and memory of one GPU.

    python benchmarks/gpu_step.py --layers 8 --steps 5 --out tables
    python benchmarks/gpu_step.py --toy

Complete steps (with data, teacher and optimizer) on a dataset of photos on disk, in one process, with packs of 8,192
tokens (16,384 for the HD model), four to seven packs per step. Stage 1 has all layers and a frozen decoder. Stages 2
and 3 have full width and as many layers as fit on one GPU of 80 GB with their whole optimizer state, since there are no
other ranks to shard it over (estimate: 18 bytes per parameter, 150 KB of activations per token and layer). MFU is model
FLOPs (`megatron_eve/training/monitoring/flops.py`: no padding, no recomputation) over the bfloat16 peak of the data
sheet. The wait for data is that of the host; the GPU may still be busy meanwhile.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from gpu_common import (
    STEP_HEADER,
    measure,
    parser,
    photo_dataset,
    require_gpu,
    run_config,
    save_teacher,
    sizes,
    step_columns,
)
from tables import Table, exit_if_failed

from megatron_eve.config import ParallelConfig
from megatron_eve.data.images.backends import chosen_backend
from megatron_eve.runtime.accelerator import accelerator

CASES = (
    # title, preset, stage, layers (None: all), tokens of a pack, samples
    ("stage 1, all layers, frozen", "eve_7b", 1, None, 8192, 54),
    ("stage 2", "eve_7b", 2, 12, 8192, 96),
    ("stage 3, HD", "eve_7b_hd", 3, 10, 16384, 32),
)


def main() -> None:
    """Run the cases, print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, help="decoder layers of stages 2 and 3 (default: 12 and 10)")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.models.process_groups import process_group

    table = Table("training steps", ("run", "preset", "layers", *STEP_HEADER), arguments.out)
    with tempfile.TemporaryDirectory() as folder, process_group(ParallelConfig()):
        for title, preset, stage, layers, length, samples in CASES:
            model = sizes(preset, arguments.toy, layers and (arguments.layers or layers))
            name = f"toy-{preset}" if arguments.toy else "clip"
            config = run_config(
                model,
                samples=4 if arguments.toy else samples,
                seq_length=1024 if arguments.toy else length,
                teacher=save_teacher(Path(folder) / name, model, arguments.toy),
                data=photo_dataset(Path(folder) / preset, model, 16 if arguments.toy else 432),
                stage=stage,
            )
            with table.attempt(title):
                table.add(
                    title, preset, model.model.num_layers, *step_columns(measure(config, arguments.steps))
                )
    table.note(f"Images are decoded by {chosen_backend('auto', on_gpu=accelerator().name == 'cuda')}.")
    exit_if_failed(table.close())


if __name__ == "__main__":
    main()
