"""Checks how the layers are divided into pipeline stages and chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_eve.config.pipeline_layout import parse_layout, write_layout
from megatron_eve.config.schema import RunConfig

_LAYOUT = "--pipeline-model-parallel-layout"


def expand_layout(config: RunConfig) -> RunConfig:
    """The same run with --decoder-first-pipeline-num-layers and -last- written as --pipeline-model-parallel-layout.

    Where they are wrong they stay, so that `pipeline_errors` names what the user wrote.
    """
    parallel = config.parallel
    short = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    if short == (None, None) or parallel.pipeline_model_parallel_size < 1 or any(pipeline_errors(config)):
        return config
    written = replace(
        parallel,
        pipeline_model_parallel_layout=write_layout(config.chunk_layers),
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
    )
    return replace(config, parallel=written)


def pipeline_errors(config: RunConfig) -> Iterator[str]:
    """Errors of the pipeline settings, one line each, with flag and remedy."""
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, chunk = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if pipeline < 1:
        return  # reported by another check
    if parallel.pipeline_model_parallel_layout is not None:
        yield from _layout(config, parallel.pipeline_model_parallel_layout)
    elif first is not None or last is not None:
        yield from _uneven(config)
    elif layers % pipeline:
        yield (
            f"--pipeline-model-parallel-size {pipeline}: must divide --num-layers {layers}; or cut them unevenly, with "
            f"{_LAYOUT}"
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
                f"layers of a stage; or name the layers of each chunk, with {_LAYOUT}"
            )
        elif layers // pipeline == chunk:
            yield (
                f"--num-layers-per-virtual-pipeline-stage {chunk}: is the whole stage, so nothing interleaves; "
                "choose a smaller number or leave the flag out"
            )


def _layout(config: RunConfig, layout: str) -> Iterator[str]:
    parallel, layers = config.parallel, config.model.num_layers
    pipeline, flag = parallel.pipeline_model_parallel_size, f"{_LAYOUT} {layout}"
    for name in (
        "num_layers_per_virtual_pipeline_stage",
        "decoder_first_pipeline_num_layers",
        "decoder_last_pipeline_num_layers",
    ):
        if getattr(parallel, name) is not None:
            yield (
                f"{flag}: says how many layers each stage and chunk has; leave --{name.replace('_', '-')} out, or "
                "unset it with None"
            )
    try:
        chunks = parse_layout(layout)
    except ValueError as error:
        yield f"{flag}: {error}"
        return
    if sum(chunks) != layers:
        yield (
            f"{flag}: has {sum(chunks)} decoder layers (t), and the model has --num-layers {layers}; they must be equal"
        )
    if len(chunks) % pipeline:
        yield (
            f"{flag}: has {len(chunks)} stages (one more than |), which must be --pipeline-model-parallel-size "
            f"{pipeline}, or a multiple of it for the interleaved schedule"
        )
    elif pipeline == 1 and len(chunks) > 1:
        yield (
            f"{flag}: has {len(chunks)} stages; set --pipeline-model-parallel-size to their number, or to a part of it "
            "above 1 for the interleaved schedule"
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
            f"{flag} {count}: not with --num-layers-per-virtual-pipeline-stage, whose chunks are alike; leave one out, "
            f"or name the layers of each chunk, with {_LAYOUT}"
        )
    rest, others = layers - sum(named.values()), pipeline - len(named)
    if others == 0 and rest:
        yield f"{flag} {count}: first and last stage hold all layers, so both must add up to --num-layers {layers}"
    elif others and (rest < others or rest % others):
        yield (
            f"{flag} {count}: leaves {rest} of --num-layers {layers} for the other {others} stages, which must share "
            f"them equally; or name the layers of each stage, with {_LAYOUT}"
        )
