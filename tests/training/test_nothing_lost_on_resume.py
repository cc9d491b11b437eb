"""Ways to go on with a run that once began it anew, or ended it early, without a word."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError, check_data, check_length, check_resume
from megatron_eve.checkpoint.store import CheckpointStore
from megatron_eve.config import TRACKER, CheckpointConfig, RunConfig, validate
from megatron_eve.config.errors import ConfigError
from tests.checkpoint.test_saver import config_of, train_and_save
from tests.families.suite import run
from tests.layouts import ONE
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run of four iterations with checkpoints at 2 and 4, and its losses."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    losses, _ = ranks.run(1, train_and_save, config_of(ONE, folder, iterations=4), 2)[0]
    return folder, losses


def test_without_its_tracker_a_run_goes_on_from_the_newest_checkpoint(
    ranks: RankPool, finished: tuple[Path, list[float]], tmp_path: Path
) -> None:
    folder, losses = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / TRACKER).unlink()
    shutil.rmtree(copy / "iter_0000004")
    again = ranks.run(1, run, config_of(ONE, copy, iterations=4, load=True))[0]
    assert again.losses == losses[2:]


def test_one_checkpoint_of_a_run_can_be_named(ranks: RankPool, finished: tuple[Path, list[float]]) -> None:
    """The older one, although the tracker names the newer."""
    folder, losses = finished
    config = config_of(ONE, folder / "iter_0000002", iterations=4, load=True)
    config = replace(config, checkpoint=replace(config.checkpoint, save=None))
    assert ranks.run(1, run, config)[0].losses == losses[2:]


def test_names_of_checkpoints(
    finished: tuple[Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    assert CheckpointStore(folder).candidates() == [4, 2]
    assert CheckpointStore(folder / "iter_0000002").candidates() == [2]
    monkeypatch.chdir(folder / "iter_0000002")
    assert CheckpointStore(".").folder(2) == folder / "iter_0000002"
    assert CheckpointStore(tmp_path / "iter_0000009").candidates() == []  # not there
    assert CheckpointStore(tmp_path).latest() is None


def _errors(**checkpoint: str) -> str:
    config = RunConfig(checkpoint=CheckpointConfig(**checkpoint))
    config = replace(
        config, data=replace(config.data, mock_data=True), training=replace(config.training, train_iters=2)
    )
    try:
        validate(config, 1)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_folder_of_checkpoints_is_not_written_over(
    finished: tuple[Path, list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    assert "holds the checkpoints of a run" in _errors(save=str(copy))
    (copy / TRACKER).unlink()
    assert "holds the checkpoints of a run" in _errors(save=str(copy))
    assert "holds the checkpoints of a run" in _errors(save=str(copy), load=str(folder))
    assert "name the folder above it" in _errors(save=str(copy / "iter_0000002"))
    monkeypatch.chdir(tmp_path)
    for save, load in (("run/", "run"), (str(copy), "./run"), ("run", str(tmp_path / "x" / ".." / "run"))):
        assert _errors(save=save, load=load) == ""


def _saved(config: RunConfig, iteration: int, consumed: int) -> dict[str, object]:
    return {"config": config.to_dict(), "iteration": iteration, "consumed_samples": consumed}


def test_another_batch_size_does_not_move_the_end_of_a_run() -> None:
    config = RunConfig()
    half = replace(config, training=replace(config.training, global_batch_size=8, train_iters=8))
    saved = _saved(config, 4, 64)  # by batches of 16
    with pytest.raises(
        CheckpointError, match=r"--global-batch-size 16, and this run has 8.*--train-samples 96"
    ) as caught:
        check_length(Path("run/iter_0000004"), saved, half)
    assert "\n" not in str(caught.value)
    check_length(
        Path("run"), saved, replace(half, training=replace(half.training, train_iters=None, train_samples=96))
    )
    check_length(Path("run"), saved, replace(half, training=replace(half.training, global_batch_size=16)))


def test_reordered_data_is_refused() -> None:
    config = RunConfig()
    fingerprint = {"samples": [3], "content": ["aa"], "dropped samples": []}
    saved = {"config": config.to_dict(), "dataset": fingerprint}
    check_data(Path("run"), saved, config, fingerprint)
    with pytest.raises(
        CheckpointError, match=r"dataset 1 of --data-path holds other samples .* or the same in another order"
    ):
        check_data(Path("run"), saved, config, {**fingerprint, "content": ["bb"]})
    # Datasets and checkpoints of older versions have no digest.
    check_data(Path("run"), saved, config, {**fingerprint, "content": [""]})
    check_data(Path("run"), {**saved, "dataset": {"samples": [3]}}, config, fingerprint)


def test_an_import_is_nothing_to_resume_from() -> None:
    config = RunConfig()
    saved = {**_saved(config, 0, 0), "dataset": None}
    with pytest.raises(CheckpointError, match="give it as --pretrained-checkpoint in place of --load"):
        check_resume(Path("imported/iter_0000000"), saved, config, {"samples": [3]}, None)
