"""Settings of a run that trains the tower: flags, sizes, what is refused, and what a checkpoint says of the tower."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_eve.config import PRESETS, ConfigError, RunConfig, load_recipe, parse, validate
from megatron_eve.config.flags import PRETRAIN, TRAIN_TOWER
from megatron_eve.config.memory import rank_memory
from megatron_eve.models.registry import find_family, tower_families, tower_family
from megatron_eve.models.vila_u.tower_config import TowerConfig, tower_settings
from megatron_eve.models.vila_u.tower_folder import is_tower, read_tower_folder
from megatron_eve.models.vila_u.tower_parameters import float32_bytes, parameter_counts
from megatron_eve.models.vila_u.tower_record import record_of_run
from tests.models.vila_u.pairs import SIGLIP

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def siglip(tmp_path: Path) -> Path:
    (tmp_path / "siglip").mkdir()
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(SIGLIP))
    return tmp_path / "siglip"


def flags(siglip: Path, *others: str) -> list[str]:
    return [
        "--preset", "vila_u_tower_tiny", "--vision-tower", str(siglip), "--data-path", "pairs",
        "--train-iters", "3", "--global-batch-size", "4", "--perceptual-weights", "random", *others,
    ]  # fmt: skip


def test_a_family_of_its_own_inside_the_folder_of_the_model() -> None:
    (family,) = tower_families()
    assert family is find_family("vila_u_tower") is tower_family("vila_u_tower")
    assert tower_family("vila_u") is None
    assert set(family.presets) <= set(PRESETS)


def test_each_command_takes_its_own_presets(siglip: Path) -> None:
    config = parse(flags(siglip), TRAIN_TOWER)
    assert config.family == "vila_u_tower" and config.training.stage == 1
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.5, 0.9)
    with pytest.raises(
        ConfigError, match=r"--preset vila_u_tower_tiny: .* use python -m megatron_eve.train_tower"
    ):
        parse(flags(siglip), PRETRAIN)
    with pytest.raises(ConfigError, match=r"--preset eve_tiny: .* use python -m megatron_eve.pretrain"):
        parse(["--preset", "eve_tiny"], TRAIN_TOWER)
    assert parse(flags(siglip)) == config  # as preflight reads it
    validate(config, 2)


REFUSED = {
    "--tensor-model-parallel-size 2": "--tensor-model-parallel-size 2: a tower is trained data parallel only",
    "--pipeline-model-parallel-size 2": "--pipeline-model-parallel-size 2: a tower is trained data parallel only",
    "--context-parallel-size 2": "--context-parallel-size 2: a tower is trained data parallel only",
    "--num-layers 2": "--num-layers 2: is of a decoder",
    "--lora-rank 8": "--lora-rank 8: adapters are of a decoder",
    "--seq-length 128": "--seq-length 128: is of no use to a tower",
    "--mock-data": "--mock-data True: is of no use to a tower",
    "--global-batch-size 1": "a step of 1 pairs is too few for 2 ranks",
    "--global-batch-size 1 --train-iters 2 --contrastive-weight 0": "a step of 1 pairs is too few for 2 ranks",
    "--train-iters None --train-samples 9": "a step of 1 pairs is too few for 2 ranks",
    "--code-grid 3": "--code-grid 3: must divide 4, the patches along a side",
    "--decoder-multipliers 1 2": "2 levels make pictures of 8 pixels from a grid of 4, and 64 are needed",
    "--decoder-grid 8": "5 levels make pictures of 128 pixels from a grid of 8, and 64 are needed",
    "--decoder-channels 48": "--decoder-channels 48: must be a multiple of 32",
    "--visual-codebook-size 70000": "at most 65,536 can be told apart",
    "--contrastive-weight -1": "--contrastive-weight -1: must be 0 or more, and finite",
    "--contrastive-weight 0 --reconstruction-weight 0": "there is nothing to train",
    "--perceptual-weights x.safetensors": "--perceptual-weights x.safetensors: no such file",
    "--vision-tower nowhere": "nowhere",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused(siglip: Path, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(parse(flags(siglip, *words.split())), 2)
    assert REFUSED[words] in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_one_pair_has_nothing_to_be_compared_with(siglip: Path) -> None:
    def errors(*words: str) -> str:
        try:
            validate(parse(flags(siglip, *words)), 1)
        except ConfigError as error:
            return str(error)
        return ""

    assert "the contrastive loss compares" in errors("--global-batch-size", "1")
    assert "the last step would have one pair" in errors("--train-iters", "None", "--train-samples", "9")
    assert not errors("--global-batch-size", "1", "--contrastive-weight", "0")


def test_a_tower_without_texts(siglip: Path) -> None:
    (siglip / "config.json").write_text(json.dumps({**SIGLIP["vision_config"]}))
    with pytest.raises(ConfigError, match=r"has no text_config, .* name a SigLIP with both sides"):
        validate(parse(flags(siglip)), 1)


@pytest.fixture(params=["tiny", "256"])
def sizes(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[TowerConfig, dict[str, Any]]]:
    fields = json.loads(json.dumps(SIGLIP))
    if request.param == "256":
        large = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
        }
        fields["vision_config"].update(large, image_size=256)
        fields["text_config"].update(large, vocab_size=32000, max_position_embeddings=64)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    vision = replace(PRESETS[f"vila_u_tower_{request.param}"].vision, vision_tower=str(tmp_path))
    yield vision, fields


def test_parameters_are_counted_without_torch_as_torch_has_them(
    sizes: tuple[TowerConfig, dict[str, Any]],
) -> None:
    import torch
    import transformers

    from megatron_eve.models.towers.discriminator import PatchDiscriminator
    from megatron_eve.models.towers.perceptual import PerceptualLoss
    from megatron_eve.models.vila_u.tower import UnifiedTower

    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    vision, fields = sizes
    with torch.device("meta"):
        tower = UnifiedTower(tower_settings(vision))
        whole = transformers.SiglipModel(transformers.SiglipConfig.from_dict(fields))
    discriminator = PatchDiscriminator()
    counts = parameter_counts(vision)
    assert counts.first_stage == count(whole, tower.post_quant_conv, tower.decoder, discriminator)
    assert counts.frozen == count(whole.text_model)
    config = RunConfig(family="vila_u_tower", vision=vision)
    memory = rank_memory(config, 4)
    trained = counts.first_stage - counts.frozen
    codebooks = sum(buffer.nbytes for buffer in tower.quantizer.buffers())
    assert memory.weights == 4 * counts.first_stage + codebooks
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained // 4)
    half = rank_memory(replace(config, training=replace(config.training, bf16=True)), 4)
    exact = count(discriminator) + 2  # and scale and bias of the logits
    assert half.weights == memory.weights - 2 * (counts.first_stage - exact)
    assert (half.gradients, half.optimizer) == (memory.gradients, (12 * trained - 4 * exact) // 4)
    perceptual = sum(buffer.nbytes for buffer in PerceptualLoss().buffers() if buffer.numel() > 3)
    assert float32_bytes(replace(vision, perceptual_weights="vgg16.pth")) == codebooks + perceptual


def test_a_checkpoint_says_what_its_tower_is(
    sizes: tuple[TowerConfig, dict[str, Any]], tmp_path: Path
) -> None:
    vision, _ = sizes
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(record_of_run(vision)))
    assert is_tower(folder)
    assert replace(read_tower_folder(folder), folder=Path(".")) == replace(
        tower_settings(vision), folder=Path(".")
    )


def test_the_recipe_is_one_of_towers() -> None:
    config = load_recipe(ROOT / "examples" / "vila_u_7b" / "tower.yaml")
    assert config.vision == PRESETS["vila_u_tower_256"].vision and config.optimizer.adam_beta1 == 0.5
