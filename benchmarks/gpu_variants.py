"""Effect of single settings on a training step: shapes, fusions, recomputation, layer implementation.

    python benchmarks/gpu_variants.py --layers 4 --steps 5 --out tables
    python benchmarks/gpu_variants.py --toy

Stage 2 of `eve_7b` at full width without the aligning layer, about four packs of 8,192 tokens per step: first with the
default settings, then with one flag changed at a time. Variants that this machine does not support are noted and
skipped. Without a pipeline, fixed and variable shapes differ only in padding; measuring the exchange of shapes between
pipeline stages needs several GPUs.
"""

from __future__ import annotations

from typing import Any

from gpu_common import (
    STEP_HEADER,
    measure,
    parser,
    require_gpu,
    run_config,
    sizes,
    step_columns,
)
from tables import Table, exit_if_failed

from megatron_eve.config import ParallelConfig

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("default", {}),
    ("--variable-seq-lengths true", {"parallel": ParallelConfig(variable_seq_lengths=True)}),
    ("--variable-seq-lengths false", {"parallel": ParallelConfig(variable_seq_lengths=False)}),
    ("--no-gradient-accumulation-fusion", {"gradient_accumulation_fusion": False}),
    ("--cross-entropy-loss-fusion (native)", {"cross_entropy_loss_fusion": True}),
    (
        "--cross-entropy-loss-fusion (te)",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    ),
    (
        "--recompute-granularity selective --recompute-modules mlp",
        {"recompute_granularity": "selective", "recompute_modules": ("mlp",)},
    ),
    ("--recompute-granularity full", FULL),
    ("--transformer-impl local", {"transformer_impl": "local"}),
)


def main() -> None:
    """Run all supported variants and print the table."""
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4, help="decoder layers")
    arguments = options.parse_args()
    require_gpu(arguments.toy)
    from megatron_eve.config import ConfigError
    from megatron_eve.models.kernels import check_kernels, describe_kernels
    from megatron_eve.models.process_groups import process_group
    from megatron_eve.runtime.accelerator import accelerator

    model = sizes("eve_7b", arguments.toy, arguments.layers)
    table = Table("one choice at a time", ("run", *STEP_HEADER), arguments.out)
    with process_group(ParallelConfig()):
        for name, settings in VARIANTS:
            config = run_config(
                model,
                samples=4 if arguments.toy else 54,
                seq_length=1024 if arguments.toy else 8192,
                **settings,
            )
            try:
                check_kernels(config, accelerator())
            except ConfigError as error:
                table.note(f"Not run, {name}: {error}")
                continue
            if not settings:
                table.note(f"Default: {describe_kernels(config)}.")
            with table.attempt(name):
                table.add(name, *step_columns(measure(config, arguments.steps)))
    exit_if_failed(table.close())


if __name__ == "__main__":
    main()
