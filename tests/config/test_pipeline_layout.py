"""Megatron's notation of pipeline layouts: read as megatron-core reads it, and what short forms become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_eve.config import ConfigError, ParallelConfig, RunConfig, from_saved, parse, validate
from megatron_eve.config.pipeline_layout import parse_layout, write_layout

LAYOUTS = {
    "Et*3|tt|t,L": (3, 2, 1),
    "E|t*3|(t|)*2t,L": (0, 3, 1, 1, 1),
    "E,(t*2|)*3,L": (2, 2, 2, 0),
    "Ettt|(tt|)*29tL": (3, *[2] * 29, 1),
    "E||t*4||L": (0, 0, 4, 0, 0),
    "E|*2t*10L": (0, 0, 10),
}


@pytest.mark.parametrize(("text", "chunks"), LAYOUTS.items())
def test_as_megatron_core_reads_it(text: str, chunks: tuple[int, ...]) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    assert parse_layout(text) == chunks
    assert parse_layout(write_layout(chunks)) == chunks
    for written in (text, write_layout(chunks)):
        theirs = PipelineParallelLayerLayout(written, len(chunks))
        theirs.validate_layer_layout(sum(chunks), 0)
        assert tuple(stage[0].count(LayerType.decoder) for stage in theirs.layout) == chunks


def test_written() -> None:
    assert write_layout((3, 1, 0, 4)) == "Et*3|t||t*4,L"
    assert write_layout((0, 8, 0)) == "E|t*8|L"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Et*3|x|L", "'x' has no meaning here"),
        ("Et*3|(t(t)*2)*3L", "'(' has no meaning here"),
        ("Et*3 | t*5L", "' ' has no meaning here"),
        ("Et*4|t*4,m,L", "leave m out"),
        ("t*4|t*4,L", "must begin with E"),
        ("tE|t*4,L", "must begin with E"),
        ("Et*4|Et*4,L", "must begin with E, the embedding, and have it once"),
        ("Et*4|t*4", "must end in L"),
        ("Et*4,L|t*4,L", "must end in L, the loss, and have it once"),
        ("", "must begin with E"),
        ("Et*999999999999L", "is longer than"),
        ("E((t*99999)*99999)*99999L", "is longer than"),
    ],
)
def test_what_cannot_be_read(text: str, error: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_layout(text)
    assert error in str(caught.value)


MOCK = ["--preset", "eve_mini", "--mock-data", "--train-iters", "1"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def test_short_forms_become_a_layout(tmp_path: Path) -> None:
    """At parsing, from flags and recipes, and in checkpoints that older versions wrote."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "parallel: {decoder_first_pipeline_num_layers: 1, decoder_last_pipeline_num_layers: 1}\n"
    )
    flags = [*MOCK, "--config", str(recipe), "--pipeline-model-parallel-size", "4"]
    assert parse(flags).parallel == ParallelConfig(
        pipeline_model_parallel_size=4, pipeline_model_parallel_layout="Et|t*3|t*3|t,L"
    )
    # What a later flag says counts before anything is turned into a layout.
    flags += ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "7"]
    assert parse(flags).parallel.pipeline_model_parallel_layout == "Et*7|t,L"
    saved = RunConfig(
        parallel=ParallelConfig(pipeline_model_parallel_size=2, decoder_last_pipeline_num_layers=3)
    )
    tree = saved.to_dict()
    del tree["parallel"]["pipeline_model_parallel_layout"]
    opened, note = from_saved(tree, "test")
    assert (opened.parallel.pipeline_model_parallel_layout, note) == ("Et*5|t*3,L", None)
    assert opened.chunk_layers == saved.chunk_layers == (5, 3)
    wrong = parse([*MOCK, *PP2, "--decoder-first-pipeline-num-layers", "8"])
    assert wrong.parallel.decoder_first_pipeline_num_layers == 8  # for the message


def test_chunks_and_stages() -> None:
    def of(**parallel: Any) -> tuple[Any, ...]:
        config = RunConfig(parallel=ParallelConfig(pipeline_model_parallel_size=2, **parallel))
        return config.chunk_layers, config.stage_layers, config.virtual_pipeline_model_parallel_size

    assert of() == ((4, 4), (4, 4), None)
    assert of(num_layers_per_virtual_pipeline_stage=2) == ((2, 2, 2, 2), (4, 4), 2)
    assert of(pipeline_model_parallel_layout="Et|t*3|t*2|t*2,L") == ((1, 3, 2, 2), (3, 5), 2)
    assert of(pipeline_model_parallel_layout="E|t*8,L") == ((0, 8), (0, 8), None)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--pipeline-model-parallel-layout Et*4|t*3,L", "has 7 decoder layers (t), and the model has --num-layers 8"),
        ("--pipeline-model-parallel-layout Et*4|t*3|t,L", "has 3 stages (one more than |), which must be"),
        ("--pipeline-model-parallel-size 1 --pipeline-model-parallel-layout Et*4|t*4,L", "set --pipeline-model-par"),
        (
            "--num-layers-per-virtual-pipeline-stage 2 --pipeline-model-parallel-layout Et*4|t*4,L",
            "leave --num-layers-per-virtual-pipeline-stage out, or unset it with None",
        ),
        (
            "--decoder-first-pipeline-num-layers 4 --pipeline-model-parallel-layout Et*4|t*4,L",
            "leave --decoder-first-pipeline-num-layers out",
        ),
        ("--decoder-first-pipeline-num-layers 8", "leaves 0 of --num-layers 8 for the other"),
        ("--decoder-first-pipeline-num-layers 8 --pipeline-model-parallel-size 3", "--pipeline-model-parallel-layout"),
        (
            "--pipeline-model-parallel-layout E|t*3|t*4|t,L --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 3",
            "--recompute-num-layers 3: must divide the 1 layers",
        ),
        (
            "--pipeline-model-parallel-layout E|t*3|t*4|t,L --rerun-mode validate_results --overlap-grad-reduce",
            "--rerun-mode validate_results: with the interleaved schedule",
        ),
    ],
)  # fmt: skip
def test_refused_before_torch(flags: str, error: str) -> None:
    config = parse([*MOCK, *PP2, *flags.split()])
    with pytest.raises(ConfigError) as caught:
        validate(config, 6)
    assert error in str(caught.value)


def test_a_layout_that_is_wrong_is_one_mistake() -> None:
    config = parse([*MOCK, *PP2, "--pipeline-model-parallel-layout", "Et*4|x"])
    with pytest.raises(
        ConfigError, match=r"^--pipeline-model-parallel-layout Et\*4\|x: 'x' has no meaning.*$"
    ):
        validate(config, 2)
