"""The shared tests: what holds for every model family, by the cases that each says it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families.eve import EVE
from tests.families.suite import FamilyCase, Trace, loading_from, run, saving_in, with_weights
from tests.families.toy.case import TOY
from tests.layouts import ONE, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

CASES = (EVE, TOY)


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
