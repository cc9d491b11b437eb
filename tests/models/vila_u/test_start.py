"""What a run of VILA-U starts from: a whole model, a language model without the control tokens, and the tower."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.config import CheckpointConfig, DataConfig, RunConfig, TrainingConfig
from tests.convert.test_conversion import convert
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2_PP2, Layout
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

CODEBOOK = "rqvaesiglip.quantizer.codebooks.0.weight"


def model_folder() -> Path:
    return find_golden("golden/vila/vilau_model")


def run_config(layout: Layout, pretrained: Path | None, tower: Path | None) -> RunConfig:
    settings = settings_of(model_folder())
    return RunConfig(
        family="vila_u",
        model=settings.model,
        vision=replace(settings.vision, vision_tokenizer=None if tower is None else str(tower)),
        parallel=layout.parallel,
        training=TrainingConfig(stage=2, global_batch_size=2, train_iters=1),
        data=DataConfig(mock_data=True, seq_length=512),
        checkpoint=CheckpointConfig(pretrained_checkpoint=None if pretrained is None else str(pretrained)),
    )


def started(config: RunConfig) -> dict[str, Any]:
    """Runs on each rank: the parameters of a run before its first step, of this rank."""
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup

    with model_parallel(config):
        trainer = setup(config)
        found = {
            name: parameter.detach().clone()
            for chunk in map(unwrap, trainer.chunks)
            for name, parameter in chunk.global_named_parameters()
        }
        trainer.loader.close()
    return found


@pytest.mark.parametrize("layout", [ONE, TP2_PP2], ids=lambda one: one.name)
def test_a_whole_model(ranks: RankPool, layout: Layout) -> None:
    found = ranks.run(layout.world_size, started, run_config(layout, model_folder(), None))
    golden = load_file(model_folder() / "vision_tower" / "model.safetensors")
    for some, name in (
        (found[0], "vision_model.codebook.weight"),
        (found[-1], "visual_head.codebook.weight"),
    ):
        assert torch.equal(some[name][0], golden[CODEBOOK])
        assert some[name].dtype == torch.float32
    position = found[-1]["visual_head.transformer.pos_emb_d"]
    assert torch.equal(position, golden["rqtransformer.pos_emb_d"])


@pytest.mark.parametrize("layout", [ONE, PP2], ids=lambda one: one.name)
def test_a_language_model_gets_the_control_tokens(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(model_folder() / "llm", folder)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": fields["vocab_size"] - 4}))
    weights = load_file(folder / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = weights[key][:-4].clone()
    (folder / "model.safetensors").chmod(0o644)
    save_file(weights, folder / "model.safetensors")
    found = ranks.run(layout.world_size, started, run_config(layout, folder, model_folder() / "vision_tower"))
    for some, key, name in (
        (found[0], "model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        (found[-1], "lm_head.weight", "output_layer.weight"),
    ):
        mean = weights[key].mean(0)
        torch.testing.assert_close(some[name][:476], weights[key], rtol=0, atol=0)
        torch.testing.assert_close(some[name][476:480], mean.expand(4, -1), rtol=1e-6, atol=1e-8)
    golden = load_file(model_folder() / "vision_tower" / "model.safetensors")
    assert torch.equal(found[0]["vision_model.codebook.weight"][0], golden[CODEBOOK])
    assert torch.equal(found[-1]["visual_head.codebook.weight"][0], golden[CODEBOOK])


def test_the_codebook_of_a_tower_that_was_imported(ranks: RankPool, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    source = model_folder() / "vision_tower"
    assert convert("import", "--source", source, "--target", tower, "--family", "vila_u") == 0
    found = ranks.run(1, started, run_config(ONE, None, tower))[0]
    golden = load_file(source / "model.safetensors")
    assert torch.equal(found["vision_model.codebook.weight"][0], golden[CODEBOOK])
    assert torch.equal(found["visual_head.codebook.weight"][0], golden[CODEBOOK])
