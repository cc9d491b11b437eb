"""Mistakes in a run of VILA-U: one sentence each, with the flag and the remedy."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_eve.config import ConfigError, RunConfig, parse, validate
from megatron_eve.models.registry import find_family
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import CONFIG, changed, write_sizes

FLAGS = ["--preset", "vila_u_tiny", "--mock-data", "--train-iters", "2"]


def config_of(*flags: str) -> RunConfig:
    return parse([*FLAGS, *flags])


def tower_folder() -> Path:
    return find_golden("golden/vila/vilau_model") / "vision_tower"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--codes-per-position", "0"], "--codes-per-position 0: must be above 0"),
        (["--visual-loss-chunk", "0"], "--visual-loss-chunk 0: must be above 0"),
        (["--visual-codebook-size", "65537"], "--visual-codebook-size 65537: codes are stored as 16 bits"),
        (["--depth-num-attention-heads", "5"], "--depth-num-attention-heads 5: must divide"),
        (["--depth-dropout", "1"], "--depth-dropout 1: must lie in [0, 1)"),
        (["--visual-loss-weight", "-1"], "--visual-loss-weight -1: must be 0 or more"),
        (["--visual-loss-weight", "inf"], "--visual-loss-weight inf: must be 0 or more, and finite"),
        (["--code-grid", "0"], "--code-grid 0: use 1 or more"),
        (["--vision-tokenizer", "nowhere"], "--vision-tokenizer nowhere"),
    ],
)
def test_sizes(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of(*flags), 1)
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--depth-num-attention-heads", "1"], "must divide --depth-num-attention-heads 1"),
        (["--visual-codebook-size", "1023"], "must divide --visual-codebook-size 1023"),
    ],
)
def test_sizes_that_ranks_cannot_share(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of("--tensor-model-parallel-size", "2", *flags), 2)
    assert told in str(refused.value)


def test_there_is_no_stage_1() -> None:
    with pytest.raises(ConfigError, match="--stage 1: must be one of 2, 3"):
        config_of("--stage", "1")


def test_a_dataset_needs_its_tower() -> None:
    flags = [flag for flag in FLAGS if flag != "--mock-data"]
    with pytest.raises(ConfigError, match="--vision-tokenizer: name the folder of the tower"):
        validate(parse([*flags, "--data-path", "photos"]), 1)


def test_a_tower_of_other_sizes() -> None:
    with pytest.raises(ConfigError) as refused:
        validate(config_of("--vision-tokenizer", str(tower_folder()), "--codes-per-position", "8"), 1)
    assert "is of --codes-per-position 4, and this run has --codes-per-position 8; use the preset" in str(
        refused.value
    )


def other_tower(folder: Path) -> tuple[Path, Path]:
    """The golden tower in another folder, and its weights, to which `other_codebook` gives another codebook."""
    other = folder / "vision_tower"
    shutil.copytree(tower_folder(), other)
    shutil.copytree(tower_folder().parent / "siglip_config", folder / "siglip_config")
    return other, other / "model.safetensors"


def other_codebook(weights: Path) -> None:
    weights.chmod(0o644)
    tensors = load_file(weights)
    tensors["rqvaesiglip.quantizer.codebooks.0.weight"][0, 0] += 1
    save_file(tensors, weights)


def test_resume_with_another_tower(tmp_path: Path) -> None:
    family, config = find_family("vila_u"), config_of("--vision-tokenizer", str(tower_folder()))
    other, weights = other_tower(tmp_path)
    saved = {"config": config.to_dict(), "frozen": family.fingerprint(config)}
    moved = replace(config, vision=replace(config.vision, vision_tokenizer=str(other)))
    assert not list(family.check_resume(saved, moved, family.fingerprint(moved))), "it may lie elsewhere"
    assert not list(family.check_weights(saved, moved))
    other_codebook(weights)
    (told,) = family.check_resume(saved, moved, family.fingerprint(moved))
    assert told.startswith(f"was made with the vision tower {tower_folder()} (sha256 ")
    assert "resume with the same --vision-tokenizer" in told
    (told,) = family.check_weights(saved, moved)
    assert "name that tower with --vision-tokenizer, or start from a language model" in told


def test_weights_of_a_folder_with_another_codebook(tmp_path: Path) -> None:
    """A published model and `--vision-tokenizer` of another one."""
    from megatron_eve.models.hf_folder import HFFolder
    from megatron_eve.models.vila_u.hf.layouts import PARTS

    its, source = find_family("vila_u").hugging_face(), HFFolder(tower_folder().parent, PARTS)
    other, weights = other_tower(tmp_path)
    vision = config_of("--vision-tokenizer", str(other)).vision
    assert not list(its.check_weights(vision, source))
    other_codebook(weights)
    (told,) = its.check_weights(vision, source)
    assert told.startswith(
        f"has another codebook than the tower of --vision-tokenizer {other}; name the tower"
    )


def test_codebooks_of_several_sizes(tmp_path: Path) -> None:
    config = changed(CONFIG, n_embed=[64, 32, 32, 16], shared_codebook=False)
    tower = write_sizes(tmp_path / "tower", config)
    with pytest.raises(
        ConfigError, match=r"has codebooks of \[64, 32, 32, 16\] vectors, and a decoder needs one size"
    ):
        validate(config_of("--vision-tokenizer", str(tower)), 1)
