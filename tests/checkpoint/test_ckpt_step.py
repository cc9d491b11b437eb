"""One iteration of a run: by its folder, or by the run's folder and --ckpt-step."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.store import named_checkpoint
from megatron_eve.config import CheckpointConfig, ConfigError, RunConfig, validate
from tests.families.eve import run_config
from tests.families.suite import Trace, loading_from, run, saving_in
from tests.layouts import ONE
from tests.ranks import RankError, RankPool


def test_an_iteration_is_named_by_its_folder_or_by_its_number(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for number in (10, 20, 30):
        (root / f"iter_{number:07d}").mkdir(parents=True)
    one = root / "iter_0000020"
    for path, step in ((root, 20), (one, None), (one, 20)):
        assert named_checkpoint(path, step, "--load") == one
    for path in (root, tmp_path / "nowhere", tmp_path):
        assert named_checkpoint(path, None, "--load") == path
    for path, step, message in (
        (root, 25, f"--ckpt-step 25: {root} has no iteration 25; there are 10, 20, 30"),
        (root / "iter_0000025", None, f"--load {root}/iter_0000025: {root} has no iteration 25; there are 10, 20, 30"),
        (one, 30, f"--ckpt-step 30: --load {one} is iteration 20 of its run; leave one of them out"),
        (tmp_path, 5, f"--ckpt-step 5: {tmp_path} has no iteration 5; it has none"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            named_checkpoint(path, step, "--load")
        assert str(caught.value) == message
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a folder in Hugging Face layout, which has no iterations"):
        named_checkpoint(tmp_path, 5, "--pretrained-checkpoint")
    for number in range(100, 150):
        (root / f"iter_{number:07d}").mkdir()
    with pytest.raises(CheckpointError, match="no iteration 25; the last 12 of 53 are 138, 139"):
        named_checkpoint(root, 25, "--load")


def test_a_step_of_nothing_is_refused_and_a_run_may_go_on_in_the_folder_of_one_of_its_iterations(
    tmp_path: Path,
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
    config = run_config(ONE.parallel, iterations=4)
    with pytest.raises(ConfigError, match="--ckpt-step 2: of which run"):
        validate(replace(config, checkpoint=CheckpointConfig(ckpt_step=2)), 1)
    with pytest.raises(ConfigError, match="holds the checkpoints of a run; go on with it"):
        validate(replace(config, checkpoint=CheckpointConfig(save=str(tmp_path))), 1)
    one = CheckpointConfig(save=str(tmp_path), load=str(tmp_path / "iter_0000010"))
    validate(replace(config, checkpoint=one), 1)


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    """A run of three iterations with checkpoints after the first and the third, and what it went through."""
    folder = tmp_path_factory.mktemp("run")
    config = saving_in(run_config(ONE.parallel, iterations=4), folder)
    first = ranks.run(1, run, config, 1, True)[0]
    config = replace(config, checkpoint=replace(config.checkpoint, load=str(folder)))
    second = ranks.run(1, run, config, 3, True)[0]
    return folder, Trace(samples=first.samples + second.samples)


def onward(ranks: RankPool, config: RunConfig, stop: int) -> Trace:
    return ranks.run(1, run, config, stop)[0]


@pytest.mark.distributed
def test_a_run_resumes_from_an_older_iteration(ranks: RankPool, whole: tuple[Path, Trace]) -> None:
    folder, before = whole
    config = loading_from(run_config(ONE.parallel, iterations=4), folder)
    latest = onward(ranks, config, 4)
    assert len(latest.samples) == 1 and latest.samples[0] not in before.samples
    chosen = replace(config, checkpoint=replace(config.checkpoint, ckpt_step=1))
    by_folder = loading_from(config, folder / "iter_0000001")
    for one in (chosen, by_folder):
        assert onward(ranks, one, 2).samples == before.samples[1:2]


@pytest.mark.distributed
def test_weights_of_an_older_iteration(ranks: RankPool, whole: tuple[Path, Trace]) -> None:
    folder, _ = whole
    config = run_config(ONE.parallel, iterations=4)

    def first_loss(path: Path, step: int | None) -> float:
        start = CheckpointConfig(pretrained_checkpoint=str(path), ckpt_step=step)
        return onward(ranks, replace(config, checkpoint=start), 1).losses[0]

    older = first_loss(folder, 1)
    assert older == first_loss(folder / "iter_0000001", None) != first_loss(folder, None)


@pytest.mark.distributed
def test_a_damaged_one_that_is_asked_for_is_not_replaced_by_another(
    ranks: RankPool, whole: tuple[Path, Trace], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "iter_0000003" / "common.pt").unlink()
    config = loading_from(run_config(ONE.parallel, iterations=4), folder)
    assert onward(ranks, config, 2).samples == whole[1].samples[1:2]
    with pytest.raises(RankError) as caught:
        onward(ranks, replace(config, checkpoint=replace(config.checkpoint, ckpt_step=3)), 4)
    assert (
        f"{folder}/iter_0000003: common.pt is missing, and it was asked for by its number; name another iteration "
        "(--ckpt-step)" in str(caught.value)
    )
