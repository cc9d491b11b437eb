"""Checkpoints that must not be used are refused with a reason; a save that was cut short changes nothing."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_eve.checkpoint.compatibility import (
    CheckpointError,
    check_data,
    check_parameter_groups,
    rank_layout,
)
from megatron_eve.config import (
    CheckpointConfig,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
)
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.preflight import check_run
from tests.families.eve import TEACHER, run_config
from tests.families.suite import loading_from, run, saving_in
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2_SP
from tests.ranks import RankError, RankPool

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
    assert f"{name} is missing" in error and "no checkpoint there is whole" in error
    assert "rank 0:" in error and "rank 1:" in error  # every rank says so, none waits for another


def test_truncated_file(ranks: RankPool, copy: Path) -> None:
    shard = copy / "iter_0000002" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "__1_0.distcp holds 1000 of" in load(ranks, copy)


def test_folder_named_by_the_tracker_is_gone(ranks: RankPool, copy: Path) -> None:
    shutil.rmtree(copy / "iter_0000002")
    assert "iter_0000002: the folder is missing" in load(ranks, copy)


def test_tracker_without_a_number(ranks: RankPool, copy: Path) -> None:
    """A resume takes the newest whole checkpoint; who wants weights is asked which."""
    (copy / "latest_checkpointed_iteration.txt").write_text("release!")
    config = run_config(ONE.parallel, iterations=4)
    assert len(ranks.run(1, run, loading_from(config, copy), 3)[-1].losses) == 1
    config = replace(config, checkpoint=CheckpointConfig(pretrained_checkpoint=str(copy)))
    with pytest.raises(RankError, match="holds 'release!', not an iteration"):
        ranks.run(1, run, config, 1)


@pytest.mark.parametrize("name", ["common.pt", ".metadata", "__0_0.distcp", "optimizer__1_1.distcp"])
def test_a_flipped_bit_is_found(ranks: RankPool, copy: Path, name: str) -> None:
    path = copy / "iter_0000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    error = load(ranks, copy)
    assert f"{name} is damaged" in error or f"{name} cannot be read" in error


def test_another_model_size(ranks: RankPool, copy: Path) -> None:
    config = replace(run_config(ONE.parallel), model=replace(ModelConfig(), hidden_size=96))
    assert "was made with --hidden-size 64, this run has 96" in load(ranks, copy, config)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("training", {"seed": 7}, "--seed 1234, this run has 7"),
        ("data", {"shuffle": False}, "--shuffle True, this run has False"),
        ("data", {"split": "99,1"}, "--split 100,0, this run has 99,1"),
        ("data", {"group_by_modality": True}, "--group-by-modality False, this run has True"),
    ],
)
def test_another_order_of_samples(
    ranks: RankPool, copy: Path, section: str, change: dict[str, Any], message: str
) -> None:
    config = run_config(ONE.parallel)
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    error = load(ranks, copy, config)
    assert f"was made with {message}" in error and "--pretrained-checkpoint" in error


def test_batches_drawn_by_modality_keep_their_size() -> None:
    config = run_config(ONE.parallel)
    config = replace(config, data=replace(config.data, group_by_modality=True))
    saved = {"config": config.to_dict(), "dataset": {}}
    check_data(Path("iter"), saved, config, {})
    other = replace(config, training=replace(config.training, global_batch_size=4))
    with pytest.raises(CheckpointError, match="--global-batch-size 8, this run has 4"):
        check_data(Path("iter"), saved, other, {})


def test_a_split_is_compared_by_what_it_says() -> None:
    config = run_config(ONE.parallel)
    config = replace(config, data=replace(config.data, split="99,1"))
    saved = {"config": config.to_dict(), "dataset": {}}
    check_data(Path("iter"), saved, replace(config, data=replace(config.data, split="198, 2")), {})
    with pytest.raises(CheckpointError, match="--split 99,1, this run has 98,2"):
        check_data(Path("iter"), saved, replace(config, data=replace(config.data, split="98,2")), {})


@pytest.mark.parametrize(
    ("stage", "globs", "message"),
    [
        (1, {}, "was made with --stage 2, this run has 1, so the optimizer's state"),
        (
            2,
            {"vision_model.*": 4e-4},
            "with --lr-overrides for the globs none, this run has vision_model",
        ),
    ],
)
def test_other_groups_of_parameters(
    ranks: RankPool, checkpoint: Path, stage: int, globs: dict[str, float], message: str
) -> None:
    config = run_config(ONE.parallel, iterations=4)
    training, optimizer = (
        replace(config.training, stage=stage),
        replace(config.optimizer, lr_overrides=globs),
    )
    config = replace(config, training=training, optimizer=optimizer)
    said = load(ranks, checkpoint, config)
    assert message in said and "--pretrained-checkpoint" in said and "KeyError" not in said
    with pytest.raises(ConfigError, match=message):  # the same before torch is loaded
        check_run(loading_from(config, checkpoint), 1)


def test_the_same_globs_may_have_other_rates() -> None:
    def config(**rates: float) -> RunConfig:
        return RunConfig(optimizer=OptimizerConfig(lr_overrides=rates))

    saved = {"config": config(a=1e-3, b=1e-3).to_dict()}
    check_parameter_groups(Path("iter"), saved, config(a=2e-3, b=1e-3))
    with pytest.raises(CheckpointError, match="for the globs a b, this run has a, so"):
        check_parameter_groups(Path("iter"), saved, config(a=1e-3))


def optimizer_of(config: RunConfig) -> str:
    """Runs on each rank: builds the optimizer, and returns what was wrong, or the warnings that were printed."""
    import contextlib
    import io

    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup

    printed = io.StringIO()
    with model_parallel(config), contextlib.redirect_stdout(printed):
        try:
            setup(config).loader.close()
        except ConfigError as error:
            return str(error)
    return "\n".join(line for line in printed.getvalue().splitlines() if line.startswith("warning: "))


def test_a_glob_that_matches_no_parameter(ranks: RankPool) -> None:
    """What matches on the other pipeline stage alone is fine; what matches nowhere is refused on both."""

    def config(*globs: str) -> RunConfig:
        found = run_config(PP2.parallel, iterations=4)
        return replace(found, optimizer=replace(found.optimizer, lr_overrides=dict.fromkeys(globs, 1e-4)))

    assert ranks.run(2, optimizer_of, config("vision_model.*", "output_layer.*")) == ["", ""]
    one, other = ranks.run(2, optimizer_of, config("vision_model.*", "vision_modle.*"))
    assert one == other
    assert one.startswith(
        "--lr-overrides vision_modle.*: matches no parameter of the model; near to it are vision_m"
    )


def test_a_glob_that_matches_only_what_is_frozen_is_said(ranks: RankPool) -> None:
    """They lie on the last pipeline stage, and the first rank says it, once."""
    config = run_config(PP2.parallel, iterations=4, stage=1)
    globs = dict.fromkeys(("vision_model.*", "decoder.layers.5.*"), 1e-4)
    config = replace(config, optimizer=replace(config.optimizer, lr_overrides=globs))
    told = (
        "warning: --lr-overrides decoder.layers.5.*: matches only parameters that stage 1 does not train, so it has "
        "no effect"
    )
    assert ranks.run(2, optimizer_of, config) == [told, ""]


def test_settings_that_move_no_rank_leave_the_layout_the_same() -> None:
    config = run_config(ONE.parallel, iterations=4).to_dict()
    parallel = config["parallel"]

    def layout(**changes: Any) -> dict[str, Any]:
        return rank_layout({**config, "parallel": {**parallel, **changes}})

    assert layout(distributed_timeout_minutes=33, overlap_grad_reduce=True) == rank_layout(config)
    older = {name: value for name, value in parallel.items() if name != "pipeline_model_parallel_layout"}
    assert rank_layout({**config, "parallel": older}) == rank_layout(config)
    assert layout(tensor_model_parallel_size=2) != rank_layout(config)
    two = {"pipeline_model_parallel_size": 2}
    short = layout(**two, decoder_first_pipeline_num_layers=5)  # as older versions kept it
    assert short == layout(**two, pipeline_model_parallel_layout="E(t)*5|t*3,L") != layout(**two)


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
        vision=replace(config.vision, image_size=448),
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


PLAIN = EVEConfig()


def without_teacher(config: RunConfig) -> RunConfig:
    return replace(config, vision=PLAIN)


def everything_in(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Runs on each rank: names of the tensors of a checkpoint, and its common part."""
    from megatron.core import dist_checkpointing

    names = list(dist_checkpointing.load_tensors_metadata(str(folder)))
    return names, dist_checkpointing.load_common_state_dict(str(folder))


def test_the_teacher_is_known_by_its_hashes_alone(ranks: RankPool, checkpoint: Path) -> None:
    folder = checkpoint / "iter_0000002"
    names, common = ranks.run(1, everything_in, folder)[0]
    weights = {name for name in names if not name.startswith("optimizer.")}
    assert any("aligning_layer.query_tap" in name for name in weights)
    assert not [name for name in names if "tower" in name or "embeddings.position_embedding" in name]
    teacher = find_golden(TEACHER)
    assert common["frozen"]["path"] == str(teacher)
    expected = hashlib.sha256((teacher / "model.safetensors").read_bytes()).hexdigest()
    assert common["frozen"]["sha256"]["model.safetensors"] == expected


def test_another_teacher_or_none(ranks: RankPool, copy: Path, tmp_path: Path) -> None:
    assert "was made with --patch-aligning; resume with it" in load(
        ranks, copy, without_teacher(run_config(ONE.parallel, iterations=4))
    )
    moved = Path(shutil.copytree(find_golden(TEACHER), tmp_path / "moved"))
    config = run_config(ONE.parallel, iterations=4)
    config = replace(config, vision=replace(config.vision, teacher_model=str(moved)))
    assert len(ranks.run(1, run, loading_from(config, copy), 3)[-1].losses) == 1
    other_state = replace(config, vision=replace(config.vision, teacher_hidden_state=-3))
    assert "was made with --teacher-hidden-state -2, this run has -3" in load(ranks, copy, other_state)
    weights = load_file(moved / "model.safetensors")
    weights[next(iter(weights))] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    error = load(ranks, copy, config)
    assert "whose model.safetensors has sha256" in error and "--teacher-model" in error


def test_an_aligning_layer_may_come_and_go_between_stages(
    ranks: RankPool, copy: Path, tmp_path: Path
) -> None:
    """Weights alone: without the layer it is left behind; where it is new it starts fresh, and that is said."""
    aligned = run_config(ONE.parallel, iterations=2)
    onward = replace(without_teacher(aligned), checkpoint=CheckpointConfig(pretrained_checkpoint=str(copy)))
    plain = ranks.run(1, run, saving_in(onward, tmp_path / "plain"), 1, True)[-1]
    assert plain.aligning == [0.0]
    back = replace(aligned, checkpoint=CheckpointConfig(pretrained_checkpoint=str(tmp_path / "plain")))
    # Another width matters only to the layer that is not there.
    trace = ranks.run(2, run, replace(back, parallel=TP2_SP.parallel), 1)[-1]
    assert trace.aligning[0] > 0.5
    narrow = replace(onward, vision=replace(onward.vision, teacher_hidden_size=32))
    assert ranks.run(1, run, narrow, 1)[-1].losses == plain.losses
    error = load(ranks, copy, replace(aligned, vision=replace(aligned.vision, aligning_heads=4)))
    assert "--aligning-heads 8, this run has 4" in error


def test_a_published_folder_without_the_aligning_layer(ranks: RankPool, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(find_golden("_shared/hf_mini224"), tmp_path / "hf"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if "vision_tower_compressor" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    config = replace(run_config(ONE.parallel), checkpoint=CheckpointConfig(pretrained_checkpoint=str(folder)))
    known = ranks.run(1, run, run_config(ONE.parallel), 1)[-1]
    fresh = ranks.run(1, run, config, 1)[-1]
    assert fresh.losses == known.losses and fresh.aligning != known.aligning
    assert fresh.aligning[0] > 0.5
    half = {**kept, **{name: x for name, x in tensors.items() if "compressor.output_layer" in name}}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RankError, match=r"has no tensor model\.vision_tower_compressor\.norm_layer"):
        ranks.run(1, run, config, 1)
