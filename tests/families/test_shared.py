"""The shared tests: what holds for every model family, by the cases that each says it has."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.config import CheckpointConfig, RunConfig
from megatron_eve.data.text.conversation import IMAGE_TOKEN_ID
from megatron_eve.inference.generate import generation_config
from tests.convert.test_conversion import convert
from tests.families.eve import EVE
from tests.families.eve2 import EVE2
from tests.families.suite import FamilyCase, Trace, loading_from, run, saving_in, with_weights
from tests.families.toy.case import TOY
from tests.families.vila import VILA
from tests.families.vila_u import VILA_U
from tests.layouts import ONE, TP2_PP2, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

CASES = (EVE, TOY, VILA, VILA_U, EVE2)


def each(
    fast: Callable[[FamilyCase], tuple[Layout, ...]], slow: Callable[[FamilyCase], tuple[Layout, ...]]
) -> pytest.MarkDecorator:
    """A test for each family and each of its layouts, as the arguments `case` and `layout`."""
    some = [
        pytest.param(case, layout, id=f"{case.name}-{layout.name}", marks=marks)
        for case in CASES
        for layouts, marks in ((fast(case), ()), (slow(case), (pytest.mark.slow,)))
        for layout in layouts
    ]
    return pytest.mark.parametrize(("case", "layout"), some)


@pytest.fixture(scope="module")
def one_process(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[FamilyCase], tuple[Path, Trace]]:
    """The folder that layouts take weights from, and the run on one process; made once for each family."""
    known: dict[str, tuple[Path, Trace]] = {}

    def of(case: FamilyCase) -> tuple[Path, Trace]:
        if case.family not in known:
            folder = tmp_path_factory.mktemp(case.name)
            config = with_weights(case.config(ONE.parallel, 20), ranks, folder)
            known[case.family] = folder, ranks.run(1, run, config)[-1]
        return known[case.family]

    return of


def agree(trace: Trace, expected: Trace, first: int = 0) -> None:
    """The same samples, and losses within 1e-5, from an iteration on."""
    last = first + len(trace.samples)
    assert trace.samples == expected.samples[first:last]
    assert list(trace.values) == list(expected.values)
    for name, losses in trace.values.items():
        assert losses == pytest.approx(expected.values[name][first:last], abs=1e-5, rel=0), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_learns(one_process: Callable[[FamilyCase], tuple[Path, Trace]], case: FamilyCase) -> None:
    _, trace = one_process(case)
    assert set(case.learns) <= set(trace.values)
    for name in case.learns:
        assert trace.values[name][-1] < trace.values[name][0] - 0.001, name


@each(lambda case: case.layouts, lambda case: case.slow_layouts)
def test_twenty_losses_agree(
    ranks: RankPool,
    one_process: Callable[[FamilyCase], tuple[Path, Trace]],
    case: FamilyCase,
    layout: Layout,
) -> None:
    folder, expected = one_process(case)
    config = with_weights(case.config(layout.parallel, 20), ranks, folder)
    agree(ranks.run(layout.world_size, run, config)[-1], expected)


@each(lambda case: case.resumed, lambda case: case.slow_resumed)
def test_resume_is_bit_exact(ranks: RankPool, tmp_path: Path, case: FamilyCase, layout: Layout) -> None:
    config = case.config(layout.parallel, 6)
    whole = ranks.run(layout.world_size, run, config)[-1]
    first = ranks.run(layout.world_size, run, saving_in(config, tmp_path), 3, True)[-1]
    second = ranks.run(layout.world_size, run, loading_from(config, tmp_path))[-1]
    for name, losses in whole.hexadecimal().items():
        assert first.hexadecimal()[name] + second.hexadecimal()[name] == losses, name
    assert first.samples + second.samples == whole.samples


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resume_under_another_layout(
    ranks: RankPool,
    tmp_path: Path,
    one_process: Callable[[FamilyCase], tuple[Path, Trace]],
    case: FamilyCase,
) -> None:
    folder, expected = one_process(case)
    layout, others = case.saved
    config = with_weights(case.config(layout.parallel, 20), ranks, folder)
    ranks.run(layout.world_size, run, saving_in(config, tmp_path), 3, True)
    for other in others:
        resumed = loading_from(case.config(other.parallel, 20), tmp_path)
        agree(ranks.run(other.world_size, run, resumed, 5)[-1], expected, first=3)


@pytest.mark.parametrize("case", [case for case in CASES if case.converts], ids=lambda case: case.name)
def test_conversion_there_and_back(
    ranks: RankPool,
    tmp_path: Path,
    one_process: Callable[[FamilyCase], tuple[Path, Trace]],
    case: FamilyCase,
) -> None:
    """A checkpoint, exported and imported: the next losses of a run from it are the same bit for bit."""
    folder, _ = one_process(case)
    saved, exported, imported = (tmp_path / name for name in ("saved", "exported", "imported"))
    config = with_weights(case.config(ONE.parallel, 20), ranks, folder)
    ranks.run(1, run, saving_in(config, saved), 2, True)
    family, flags = ("--family", case.family), case.conversion()
    assert convert("export", "--source", saved, "--target", exported, *family, *flags) == 0
    assert convert("import", "--source", exported, "--target", imported, *family, *flags) == 0
    traces = []
    for weights, layout in ((saved, ONE), (imported, ONE), (exported, TP2_PP2)):
        some = case.config(layout.parallel, 20)
        some = replace(some, checkpoint=CheckpointConfig(pretrained_checkpoint=str(weights)))
        traces.append(ranks.run(layout.world_size, run, some, 2)[-1])
    assert traces[0].hexadecimal() == traces[1].hexadecimal()
    agree(traces[2], traces[0])


def picture(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def answers(config: RunConfig, weights: str, cached: bool) -> list[list[int]]:
    """Runs on each rank: five more tokens of two prompts, in one batch with a cache, or all over for each token."""
    from megatron_eve.inference.generate import Prompt, generate
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.decoder_run import load_pretrained

    prompts = [
        Prompt([1, IMAGE_TOKEN_ID, 40, 41], [picture(90, 60)]),
        Prompt([1, IMAGE_TOKEN_ID, 50, IMAGE_TOKEN_ID, 51], [picture(40, 100), picture(64, 64)]),
    ]
    with model_parallel(config):
        (model,) = build_chunks(config, freeze=False)
        load_pretrained(weights, [model], config)
        if cached:
            return generate(model, prompts, config, max_new_tokens=5, stop_ids=())
        found: list[list[int]] = [[] for _ in prompts]
        for _ in range(5):
            for tokens, prompt in zip(found, prompts, strict=True):
                longer = Prompt(prompt.tokens + tokens, prompt.images)
                tokens += generate(model, [longer], config, max_new_tokens=1, stop_ids=())[0]
        return found


@pytest.mark.parametrize("case", [case for case in CASES if case.answers], ids=lambda case: case.name)
def test_generation_under_a_layout(
    ranks: RankPool, one_process: Callable[[FamilyCase], tuple[Path, Trace]], case: FamilyCase
) -> None:
    """Greedy tokens with a cache, in a batch, under a layout: as one process gives them without a cache."""
    folder, _ = one_process(case)
    config = with_weights(case.config(ONE.parallel, 20), ranks, folder)
    weights = str(config.checkpoint.pretrained_checkpoint)
    (expected,) = ranks.run(1, answers, generation_config(config, 1, 1), weights, False)
    found = ranks.run(4, answers, generation_config(config, 2, 2), weights, True)
    assert all(some == expected for some in found)
