"""VILA's folders: every published layout, and transformers' LLaVA, to a checkpoint and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.config import CheckpointConfig, DataConfig, OptimizerConfig, RunConfig, TrainingConfig
from megatron_eve.models.name_rules import renamed
from tests.convert.test_conversion import convert, llama
from tests.convert.vila_folders import (
    LANGUAGE,
    edit_config,
    llava,
    same,
    tensors,
    tower_alone,
    with_other_keys,
)
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2, TP2_PP2, Layout, parametrize
from tests.ranks import RankPool

PUBLISHED = ("vila10_llm", "vila15_llm", "vila_main_embed")
# As transformers 4 names the tower, and as its modules are named.
KEYS_OF_4 = {"vision_tower.": "vision_tower.vision_model."}
KEYS_OF_MODULES = {
    "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
}  # fmt: skip


def settings(run: Path) -> RunConfig:
    """What a checkpoint that an import wrote was made with."""
    from megatron_eve.convert.exporting import open_checkpoint

    return open_checkpoint(run)[1]


@pytest.mark.parametrize(
    "keys", [{}, KEYS_OF_4, KEYS_OF_MODULES], ids=["as 5 saves", "as 4 saves", "of modules"]
)
@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("siglip", "qwen2")])
def test_a_llava_of_transformers_goes_through_every_layout(
    tmp_path: Path, tower: str, language: str, keys: dict[str, str]
) -> None:
    """Published as LLaVA, to VILA 1.0, to VILA-1.5, and back to LLaVA: every key, every byte."""
    theirs = load_file(llava(tmp_path / "llava", tower, language) / "model.safetensors")
    source = with_other_keys(tmp_path / "llava", tmp_path / "source", keys)
    runs = []
    for layout in ("vila1.0", "vila1.5"):
        run = tmp_path / f"run for {layout}"
        assert convert("import", "--source", source, "--target", run) == 0
        runs.append(settings(run))
        source = tmp_path / layout
        assert convert("export", "--source", run, "--target", source, "--published-layout", layout) == 0
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    assert runs[0] == runs[1] == settings(tmp_path / "run")
    assert {path.name for path in source.iterdir()} == {"config.json", "llm", "vision_tower", "mm_projector"}
    assert (
        runs[0].model.vocab_size == LANGUAGE["vocab_size"] and runs[0].vision.projector_type == "mlp2x_gelu"
    )
    names = {
        "language_model.": "llm/", "vision_tower.": "vision_tower/vision_model.",
        "multi_modal_projector.linear_1.": "mm_projector/layers.0.",
        "multi_modal_projector.linear_2.": "mm_projector/layers.2.",
    }  # fmt: skip
    assert same(tensors(source), {renamed(key, names): tensor for key, tensor in theirs.items()})
    assert (runs[0].vision.vision_model_type, runs[0].model.add_qkv_bias) == (tower, language == "qwen2")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_folders_come_back(tmp_path: Path, name: str) -> None:
    """The very same files of weights; and what config.json says of them is read again."""
    source = find_golden(f"golden/vila/{name}") / "model"
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    files = {path.relative_to(source) for path in source.rglob("*.safetensors")}
    assert files == {
        path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.safetensors")
    }
    for file in files:
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    assert convert("import", "--source", tmp_path / "back", "--target", tmp_path / "again") == 0
    vision = settings(tmp_path / "run").vision
    assert settings(tmp_path / "again").vision == vision
    orders = {"vila10_llm": "row", "vila15_llm": "column", "vila_main_embed": "row"}
    assert vision.projector_token_order == orders[name]


def pass_through(config: RunConfig) -> None:
    """Runs on each rank: load weights under a layout, make a step at a rate of zero, and save them again."""
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        train_one(trainer)
        saver = CheckpointSaver(config)
        saver.save(trainer.train_state, trainer.chunks, trainer.optimizer, trainer.data.fingerprint)
        trainer.loader.close()


def run_of(folder: Path, layout: Layout, bf16: bool, target: Path, **checkpoint: str) -> RunConfig:
    """A run of a folder's sizes on mock data, whose first step changes nothing."""
    from megatron_eve.checkpoint.hf.config import settings_of

    sizes = settings_of(folder)
    return RunConfig(
        family="vila",
        model=sizes.model,
        vision=replace(sizes.vision, freeze_ViT=False),
        parallel=layout.parallel,
        training=TrainingConfig(global_batch_size=4, train_iters=20, stage=3, bf16=bf16),
        optimizer=OptimizerConfig(lr=4e-5, lr_warmup_fraction=0.1),
        data=DataConfig(mock_data=True, seq_length=256),
        checkpoint=CheckpointConfig(save=str(target), **checkpoint),
    )


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE, TP2, PP2))
@pytest.mark.parametrize(
    "bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", PUBLISHED[:2])
def test_published_folders_through_a_run(
    ranks: RankPool, tmp_path: Path, name: str, layout: Layout, bf16: bool
) -> None:
    """The weights that a run of a layout starts from, saves and exports: the very same bytes."""
    source = find_golden(f"golden/vila/{name}") / "model"
    if bf16:
        start = tmp_path / "start"
        assert convert("import", "--source", source, "--target", start, "--dtype", "bfloat16") == 0
        assert convert("export", "--source", start, "--target", tmp_path / "source") == 0
        source = tmp_path / "source"
    config = run_of(source, layout, bf16, tmp_path / "run", pretrained_checkpoint=str(source))
    ranks.run(layout.world_size, pass_through, config)
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    assert same(tensors(source), tensors(tmp_path / "back"))
    kinds = {tensor.dtype for tensor in tensors(source).values()}
    assert kinds == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("kind", ["clip", "clip_vision_model", "siglip", "siglip_vision_model"])
def test_a_language_model_and_a_tower(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A start for stage 1: both have their weights, and the projector random ones."""
    language, tower = llama(tmp_path / "llama"), tower_alone(tmp_path / "tower", kind)
    words = (
        "--family",
        "vila",
        "--vision-tower",
        tower,
        "--projector-type",
        "mlp_downsample",
        "--image-fit",
        "crop",
    )
    assert convert("import", "--source", language, "--target", tmp_path / "run", *words) == 0
    assert "initialised  6: not in the folder (vision_model.projector." in capsys.readouterr().out
    vision = settings(tmp_path / "run").vision
    assert (vision.projector_type, vision.projector_token_order, vision.image_fit) == (
        "mlp_downsample",
        "row",
        "crop",
    )
    assert vision.vision_model_type == kind.removesuffix("_vision_model")
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    theirs = load_file(tower / "model.safetensors")
    if kind == vision.vision_model_type:
        theirs = {
            key.removeprefix("vision_model."): tensor
            for key, tensor in theirs.items()
            if key.startswith("vision_model.")
        }
    ours = load_file(tmp_path / "back" / "vision_tower" / "model.safetensors")
    assert same({f"vision_model.{key}": tensor for key, tensor in theirs.items()}, ours)
    decoder = load_file(tmp_path / "back" / "llm" / "model.safetensors")
    assert same(load_file(language / "model.safetensors"), decoder)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["image_aspect_ratio"] == "square" and "image_encoder" in config


def _flat_without_a_tower(tmp_path: Path) -> Path:
    """A LLaVA-1.5 as it was published: its tower is on the hub."""
    assert convert("import", "--source", llava(tmp_path / "llava"), "--target", tmp_path / "first") == 0
    flat = tmp_path / "flat"
    assert convert("export", "--source", tmp_path / "first", "--target", flat) == 0
    from safetensors.torch import save_file

    kept = {k: t for k, t in load_file(flat / "model.safetensors").items() if ".vision_tower." not in k}
    save_file(kept, flat / "model.safetensors")
    (flat / "vision_tower_config" / "config.json").unlink()
    edit_config(flat, model_type="llava", mm_vision_tower="openai/clip-vit-large-patch14-336")
    return flat


def test_a_published_llava_and_its_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, tower = _flat_without_a_tower(tmp_path), tower_alone(tmp_path / "tower")
    assert convert("import", "--source", flat, "--target", tmp_path / "run") == 2
    message = "holds no vision tower; name the folder of the one that it was trained with by --vision-tower"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {flat}: {message}"
    assert convert("import", "--source", flat, "--target", tmp_path / "run", "--vision-tower", tower) == 0
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    wanted = {f"./{key}": tensor for key, tensor in load_file(flat / "model.safetensors").items()}
    prefix = "./model.vision_tower.vision_tower.vision_model."
    wanted |= {prefix + key: tensor for key, tensor in load_file(tower / "model.safetensors").items()}
    assert same(wanted, tensors(tmp_path / "back"))


@pytest.mark.distributed
@pytest.mark.parametrize("start", ["at random", "a language model", "a model without a tower"])
def test_a_run_takes_its_tower_from_a_folder(ranks: RankPool, tmp_path: Path, start: str) -> None:
    """`--vision-tower` under TP 2 x PP 2, whatever else a run starts from."""
    tower, flat = tower_alone(tmp_path / "tower"), _flat_without_a_tower(tmp_path)
    source = llama(tmp_path / "llama", **LANGUAGE) if start == "a language model" else flat
    names = {} if start == "at random" else {"pretrained_checkpoint": str(source)}
    config = run_of(tmp_path / "llava", TP2_PP2, False, tmp_path / "run", **names)
    config = replace(config, vision=replace(config.vision, vision_tower=str(tower)))
    ranks.run(4, pass_through, config)
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model."
    ours = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
    assert same(ours, load_file(tower / "model.safetensors"))
    if names:
        theirs = load_file(source / "model.safetensors")
        assert all(torch.equal(found[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"s2": True, "s2_scales": "384,768"},
            "s2 is True, and features of a picture at several scales (S2)",
        ),
        ({"dynamic_s2": True}, "dynamic_s2 is True, and features of a picture at several scales (S2)"),
        (
            {"image_aspect_ratio": "dynamic_s2"},
            "image_aspect_ratio is 'dynamic_s2', and features of a picture at",
        ),
        (
            {"image_aspect_ratio": "anyres"},
            "image_aspect_ratio is 'anyres', and pictures are fitted by pad, square, resize and dynamic here",
        ),
        (
            {"image_aspect_ratio": "dynamic", "min_tiles": 2},
            "min_tiles is 2, and a picture may be one tile here",
        ),
        (
            {"image_aspect_ratio": "dynamic", "max_tiles": 40},
            "max_tiles is 40, and pictures are cut into 1 to 12",
        ),
        ({"ps3": True}, "ps3 is True, and pictures of 4K by a PS3 tower are not computed here"),
        (
            {"vision_resolution": 768},
            "vision_resolution is 768, and position embeddings of the vision tower are not",
        ),
        (
            {"mm_projector_type": "mlp_downsample_3x3_s2"},
            "mm_projector_type is 'mlp_downsample_3x3_s2', and features",
        ),
        (
            {"mm_projector_type": "resampler"},
            "mm_projector_type is 'resampler', and these are known here: linear,",
        ),
        (
            {"mm_vision_select_layer": [-2, -5]},
            "mm_vision_select_layer is [-2, -5], and features of one layer of the",
        ),
        (
            {"mm_vision_select_feature": "cls_patch"},
            "mm_vision_select_feature is 'cls_patch', and all rows of a CLIP",
        ),
        (
            {"mm_use_im_start_end": True},
            "mm_use_im_start_end is True, and no tokens stand around a picture here",
        ),
        (
            {"model_type": "llava_mistral"},
            "model_type is 'llava_mistral', and the decoder is a Llama or a Qwen2 here",
        ),
    ],
    ids=lambda some: "-".join(some) if isinstance(some, dict) else "",
)
def test_what_is_not_built_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_eve.models.registry import find_family

    config = settings_from_preset()
    files = find_family("vila").hugging_face().published_files(config.model, config.vision, "float32", {}, {})
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    edit_config(tmp_path, **change)
    words = ("--family", "vila", "--source", tmp_path, "--target", tmp_path / "run")
    assert convert("import", *words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and f"config.json: {message}" in lines[0], lines


def settings_from_preset() -> Any:
    """The sizes of VILA-7B."""
    from megatron_eve.models.vila.config import PRESETS

    return PRESETS["vila_7b"]
