"""Checkpoints that must not be used are refused with a reason; a save that was cut short changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.config import CheckpointConfig, ModelConfig, RunConfig
from tests.layouts import ONE, TP2_SP
from tests.ranks import RankError, RankPool
from tests.training.test_layouts import loading_from, run, run_config, saving_in

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoint(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    ranks.run(2, run, saving_in(run_config(TP2_SP.parallel, iterations=4), folder), 2, True)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "run"))


def load(ranks: RankPool, folder: Path, config: RunConfig | None = None, world_size: int = 1) -> str:
    """The error that loading ends in."""
    config = config or run_config((TP2_SP if world_size == 2 else ONE).parallel, iterations=4)
    with pytest.raises(RankError) as caught:
        ranks.run(world_size, run, loading_from(config, folder), 3)
    return str(caught.value)


def test_layout_on_disk(checkpoint: Path) -> None:
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text() == "2"
    names = {path.name for path in (checkpoint / "iter_0000002").iterdir()}
    assert {"common.pt", "metadata.json", ".metadata", "config.yaml"} <= names
    assert not list(checkpoint.glob("*.partial"))


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", ".metadata", "__0_0.distcp", "config.yaml"])
def test_missing_file(ranks: RankPool, copy: Path, name: str) -> None:
    (copy / "iter_0000002" / name).unlink()
    error = load(ranks, copy, world_size=2)
    assert f"{name} is missing" in error and "not whole" in error and "older whole iter_ folder" in error
    assert "rank 0:" in error and "rank 1:" in error  # every rank says so, none waits for another


def test_truncated_file(ranks: RankPool, copy: Path) -> None:
    shard = copy / "iter_0000002" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "__1_0.distcp holds 1000 of" in load(ranks, copy)


def test_folder_named_by_the_tracker_is_gone(ranks: RankPool, copy: Path) -> None:
    shutil.rmtree(copy / "iter_0000002")
    assert "iter_0000002: the folder is missing" in load(ranks, copy)


def test_tracker_without_a_number(ranks: RankPool, copy: Path) -> None:
    (copy / "latest_checkpointed_iteration.txt").write_text("release!")
    assert "holds 'release!', not an iteration" in load(ranks, copy)


def test_another_model_size(ranks: RankPool, copy: Path) -> None:
    config = replace(run_config(ONE.parallel), model=replace(ModelConfig(), hidden_size=96))
    assert "was made with --hidden-size 64, this run has 96" in load(ranks, copy, config)


def test_another_order_of_samples(ranks: RankPool, copy: Path) -> None:
    error = load(ranks, copy, run_config(ONE.parallel, seed=7))
    assert "was made with --seed 1234, this run has 7" in error and "--pretrained-checkpoint" in error


def test_save_cut_short_is_not_loaded(ranks: RankPool, copy: Path) -> None:
    """What a kill during the next save leaves: a partial folder, or a whole one that nobody named."""
    shutil.copytree(copy / "iter_0000002", copy / "iter_0000003.partial")
    (copy / "iter_0000003.partial" / "common.pt").unlink()
    shutil.copytree(copy / "iter_0000002", copy / "iter_0000004")
    config = run_config(TP2_SP.parallel, iterations=4)
    expected = ranks.run(2, run, loading_from(config, copy), 4)[-1]
    assert len(expected.losses) == 2  # went on from iteration 2
    again = replace(config, checkpoint=CheckpointConfig(load=str(copy), save=str(copy)))
    ranks.run(2, run, again, 4, True)
    assert (copy / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert (
        len(ranks.run(2, run, loading_from(run_config(TP2_SP.parallel, iterations=5), copy), 5)[-1].losses)
        == 1
    )


def test_empty_folder_starts_from_the_beginning(ranks: RankPool, tmp_path: Path) -> None:
    trace = ranks.run(1, run, loading_from(run_config(ONE.parallel), tmp_path), 1)[-1]
    assert len(trace.losses) == 1


def test_weights_alone(ranks: RankPool, copy: Path) -> None:
    """--pretrained-checkpoint takes the weights and starts the count anew, also with other image sizes."""
    config = run_config(ONE.parallel)
    config = replace(
        config,
        model=replace(config.model, image_size=448),
        checkpoint=CheckpointConfig(pretrained_checkpoint=str(copy)),
    )
    trace = ranks.run(1, run, config, 2)[-1]
    assert len(trace.losses) == 2
    assert trace.losses[0] < 12


def test_weights_of_another_size(ranks: RankPool, copy: Path) -> None:
    config = replace(
        run_config(ONE.parallel),
        model=replace(ModelConfig(), num_layers=4),
        checkpoint=CheckpointConfig(pretrained_checkpoint=str(copy)),
    )
    with pytest.raises(RankError, match="--num-layers 8, this run has 4"):
        ranks.run(1, run, config, 1)
