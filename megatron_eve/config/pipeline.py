"""Checks how the layers are divided into pipeline stages and chunks."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_eve.config.schema import RunConfig


def pipeline_errors(config: RunConfig) -> Iterator[str]:
    """Errors of the pipeline settings, one line each, with flag and remedy."""
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if pipeline < 1:
        return  # reported by another check
    if first is not None or last is not None:
        yield from _uneven(config)
    elif layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline}: must divide --num-layers {layers}; or cut them unevenly, with "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
        )
    elif chunk is not None:
        if pipeline < 2:
            yield (
                "--num-layers-per-virtual-pipeline-stage: the interleaved schedule needs "
                "--pipeline-model-parallel-size above 1"
            )
        elif chunk < 1 or (layers // pipeline) % chunk:
            yield (
                f"--num-layers-per-virtual-pipeline-stage {chunk}: must divide the {layers // pipeline} "
                "layers of a stage"
            )
        elif layers // pipeline == chunk:
            yield (
                f"--num-layers-per-virtual-pipeline-stage {chunk}: is the whole stage, so nothing interleaves; "
                "choose a smaller number or leave the flag out"
            )


def _uneven(config: RunConfig) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline = parallel.pipeline_model_parallel_size
    ends = {
        "--decoder-first-pipeline-num-layers": parallel.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": parallel.decoder_last_pipeline_num_layers,
    }
    named = {flag: count for flag, count in ends.items() if count is not None}
    flag, count = next(iter(named.items()))
    if pipeline < 2:
        yield f"{flag} {count}: there is one stage; set --pipeline-model-parallel-size above 1 or leave it out"
        return
    for flag, count in named.items():
        if count < 1:
            yield f"{flag} {count}: must be at least 1"
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        yield (
            f"{flag} {count}: not with --num-layers-per-virtual-pipeline-stage, whose chunks are alike; leave one out"
        )
    rest, others = layers - sum(named.values()), pipeline - len(named)
    if others == 0 and rest:
        yield f"{flag} {count}: first and last stage hold all layers, so both must add up to --num-layers {layers}"
    elif others and (rest < others or rest % others):
        yield (
            f"{flag} {count}: leaves {rest} of --num-layers {layers} for the other {others} stages, which must share "
            "them equally"
        )
