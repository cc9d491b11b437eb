"""Whole models of VILA-U: the published folders to a checkpoint and back, with their towers, and starts from a language
model and a tower."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.registry import find_family
from tests.convert.test_conversion import convert, llama
from tests.convert.test_towers import assert_same, tensors_of
from tests.convert.test_vila import pass_through, settings
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2, TP2_PP2, Layout, parametrize
from tests.models.vila_u.towers import CONFIG, changed, write_tower
from tests.ranks import RankPool

Capture = pytest.CaptureFixture[str]
FOLDERS = ("llm", "mm_projector", "vision_tower")
CODEBOOK = "rqvaesiglip.quantizer.codebooks.{}.weight"
HEAD = ("--depth-hidden-size", 48, "--depth-num-layers", 2, "--depth-num-attention-heads", 4)
# A codebook for each depth, and blocks of four features in one vector.
SEPARATE = changed(CONFIG, shared_codebook=False, code_shape=[2, 2, 3])


def golden() -> Path:
    return find_golden("golden/vila/vilau_model")


def published(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: tensors_of(folder / name) for name in FOLDERS}


def with_copies(model: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """With what newer writers leave out of a tower: a shared codebook for each depth, and scalars by a second name."""
    tower = dict(model["vision_tower"])
    for key in [key for key in tower if ".codebooks.0." in key]:
        tower |= {key.replace(".0.", f".{level}."): tower[key] for level in (1, 2, 3)}
    for name in ("logit_scale", "logit_bias"):
        tower[f"rqvaesiglip.siglip_model.{name}"] = tower[f"rqvaesiglip.{name}"]
    return {**model, "vision_tower": tower}


def there_and_back(source: Path, place: Path, *words: object) -> Path:
    assert convert("import", "--source", source, "--target", place / "run", *words) == 0
    assert convert("export", "--source", place / "run", "--target", place / "back") == 0
    return place / "back"


def in_bfloat16(source: Path, place: Path) -> Path:
    """A copy whose every floating-point tensor is bfloat16, codebooks among them."""
    shutil.copytree(source, place)
    for file in place.rglob("*.safetensors"):
        halved = {
            key: some.bfloat16() if some.is_floating_point() else some
            for key, some in load_file(file).items()
        }
        save_file(halved, file, metadata={"format": "pt"})
    return place


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_golden_model_comes_back_with_every_key_and_byte(tmp_path: Path, bf16: bool) -> None:
    source = in_bfloat16(golden(), tmp_path / "source") if bf16 else golden()
    back = there_and_back(source, tmp_path)
    theirs, ours = with_copies(published(source)), published(back)
    for name in FOLDERS:
        assert_same(ours[name], theirs[name])
    assert len(ours["vision_tower"]) == 319
    for name in ("llm", "mm_projector"):
        file = Path(name, "model.safetensors")
        assert (back / file).read_bytes() == (source / file).read_bytes()
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        assert (back / "llm" / name).read_bytes() == (source / "llm" / name).read_bytes()
    for name in ("vision_tower/config.json", "vision_tower/preprocessor_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((source / name).read_text())
    config, known = (json.loads((place / "config.json").read_text()) for place in (back, source))
    assert {**known, **config}.keys() == known.keys()
    assert all(
        config[name] == known[name] for name in config if not name.endswith("_cfg") and name != "model_dtype"
    )
    # Copied whole, it makes the same checkpoint, whose tower is the copy's.
    shutil.copytree(source / "siglip_config", back / "siglip_config")
    assert convert("import", "--source", back, "--target", tmp_path / "again") == 0
    first, second = (DistFolder(tmp_path / name / "iter_0000000") for name in ("run", "again"))
    assert set(first) == set(second)
    assert all(torch.equal(first.tensor(key).clone(), second.tensor(key)) for key in first)
    assert replace(settings(tmp_path / "again").vision, vision_tokenizer=None) == replace(
        settings(tmp_path / "run").vision, vision_tokenizer=None
    )


def test_dtype_leaves_codebooks_as_they_are(tmp_path: Path) -> None:
    words = ("--dtype", "bfloat16")
    assert convert("import", "--source", golden(), "--target", tmp_path / "run", *words) == 0
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back", *words) == 0
    theirs, ours = with_copies(published(golden())), published(tmp_path / "back")
    for name in FOLDERS:
        kept = {
            key for key in theirs[name] if ".codebooks." in key or not theirs[name][key].is_floating_point()
        }
        assert_same(
            ours[name], {key: some if key in kept else some.bfloat16() for key, some in theirs[name].items()}
        )
    config = json.loads((tmp_path / "back" / "vision_tower" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE, TP2, PP2))
@pytest.mark.parametrize(
    "bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_the_golden_model_through_a_run(ranks: RankPool, tmp_path: Path, layout: Layout, bf16: bool) -> None:
    """Imported, trained for a step at a rate of zero under a layout, and exported: the very same tensors."""
    source = in_bfloat16(golden(), tmp_path / "source") if bf16 else golden()
    assert convert("import", "--source", source, "--target", tmp_path / "start") == 0
    known = settings(tmp_path / "start")
    config = RunConfig(
        family="vila_u",
        model=known.model,
        vision=known.vision,
        parallel=layout.parallel,
        training=TrainingConfig(global_batch_size=4, train_iters=20, stage=2, bf16=bf16),
        optimizer=OptimizerConfig(lr=4e-5, lr_warmup_fraction=0.1),
        data=DataConfig(mock_data=True, seq_length=256),
        checkpoint=CheckpointConfig(
            save=str(tmp_path / "run"), pretrained_checkpoint=str(tmp_path / "start")
        ),
    )
    ranks.run(layout.world_size, pass_through, config)
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    theirs, ours = with_copies(published(source)), published(tmp_path / "back")
    for name in FOLDERS:
        assert_same(ours[name], theirs[name])


def language_model(folder: Path, rows: int = 476) -> Path:
    llama(folder, vocab_size=rows, initializer_range=0.3)  # wide enough to tell prompts apart
    shutil.copyfile(golden() / "llm" / "tokenizer.model", folder / "tokenizer.model")
    return folder


def start(tower: Path, place: Path, *words: object, rows: int = 476) -> Path:
    """A checkpoint that begins with a language model and a tower."""
    source = language_model(place / "llama", rows)
    flags = ("--family", "vila_u", "--vision-tokenizer", tower, *words)
    assert convert("import", "--source", source, "--target", place / "run", *flags) == 0
    return place / "run"


def test_a_language_model_and_a_tower(tmp_path: Path, capsys: Capture) -> None:
    """The four rows begin as the mean of the others; the tower's depth transformer is taken."""
    run = start(golden() / "vision_tower", tmp_path, "--siglip-config", golden() / "siglip_config")
    out = capsys.readouterr().out
    assert "has no rows for all of <im_start>, <im_end>, <vi_start>, <vi_end>; 4 begin as the mean" in out
    assert convert("export", "--source", run, "--target", tmp_path / "back") == 0
    source, back = tensors_of(tmp_path / "llama"), published(tmp_path / "back")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(back["llm"][name][:476], source[name])
        mean = source[name].mean(0)
        assert torch.allclose(back["llm"][name][476:], mean.expand(4, -1), rtol=0, atol=1e-7)
        source[name] = back["llm"][name]
    assert_same(back["llm"], source)
    assert_same(back["vision_tower"], with_copies(published(golden()))["vision_tower"])
    # The tokenizer knows the tokens, in the files that the public code opens.
    llm = tmp_path / "back" / "llm"
    assert json.loads((llm / "added_tokens.json").read_text()) == json.loads(
        (golden() / "llm" / "added_tokens.json").read_text()
    )
    written = json.loads((llm / "tokenizer_config.json").read_text())
    known = json.loads((golden() / "llm" / "tokenizer_config.json").read_text())
    for name in ("added_tokens_decoder", "additional_special_tokens", "legacy", "tokenizer_class"):
        assert written[name] == known[name]
    # And the whole is a model again.
    assert convert("import", "--source", tmp_path / "back", "--target", tmp_path / "again", "--siglip-config",
                   golden() / "siglip_config") == 0  # fmt: skip


def test_rows_that_a_language_model_has_are_kept(tmp_path: Path) -> None:
    """Of one padded to more rows than pieces, or one that was made with the control tokens."""
    run = start(golden() / "vision_tower", tmp_path, rows=512)
    assert settings(run).model.vocab_size == 512


@pytest.mark.parametrize("config", [CONFIG, SEPARATE], ids=["shared", "separate-blocks"])
def test_a_tower_without_a_depth_transformer(tmp_path: Path, config: dict[str, Any], capsys: Capture) -> None:
    """The model begins with a random one; a tower's checkpoint serves as its folder does."""
    source = write_tower(tmp_path / "tower", config)
    assert convert("import", "--source", source, "--target", tmp_path / "tower run") == 0
    run = start(tmp_path / "tower run", tmp_path, *HEAD)
    assert "not in the folder (vision_model.projector." in capsys.readouterr().out
    vision = settings(run).vision
    code, latent = (config["rqvaesiglip"][name] for name in ("code_shape", "latent_shape"))
    assert (vision.code_grid, vision.codes_per_position) == (code[0], code[2])
    assert vision.code_vector_size == latent[0] // code[0] * (latent[1] // code[1]) * latent[2]
    assert vision.separate_codebooks is not config["rqvaesiglip"]["shared_codebook"]
    assert (vision.depth_hidden_size, vision.depth_num_layers) == (48, 2)
    assert convert("export", "--source", run, "--target", tmp_path / "back") == 0
    theirs, ours = tensors_of(source), published(tmp_path / "back")["vision_tower"]
    assert_same({key: some for key, some in ours.items() if not key.startswith("rqtransformer.")}, theirs)
    head = json.loads((tmp_path / "back" / "vision_tower" / "config.json").read_text())["rqtransformer"]
    assert (head["embed_dim"], head["block_size"], head["vocab_size"]) == (48, code, 64)
    # What was exported is a published model: the same tensors come back.
    again = there_and_back(_with_siglip(tmp_path / "back", source), tmp_path / "second")
    assert all(
        torch.equal(published(again)[name][key], some)
        for name in FOLDERS
        for key, some in published(tmp_path / "back")[name].items()
    )


def _with_siglip(model: Path, tower: Path) -> Path:
    shutil.copytree(tower / "siglip-tiny", model / "siglip-tiny")
    return model


def test_a_tower_that_is_missing_or_another_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "model"
    shutil.copytree(golden(), source)
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    source.rename(tmp_path / "moved")
    export = ("export", "--source", tmp_path / "run", "--target", tmp_path / "back")
    other = write_tower(tmp_path / "other")
    for words, message in (
        ((), f"error: --vision-tokenizer {source / 'vision_tower'}"),
        (("--vision-tokenizer", other), "is another tower (sha256"),
        (("--vision-tokenizer", tmp_path / "nowhere"), f"error: --vision-tokenizer {tmp_path / 'nowhere'}"),
        (("--vision-tokenizer", tmp_path / "moved" / "llm"), "model_type is 'llama'"),
    ):
        capsys.readouterr()
        assert convert(*export, *words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        assert not (tmp_path / "back").exists()
    assert convert(*export, "--vision-tokenizer", tmp_path / "moved") == 0


def test_a_codebook_that_is_not_the_checkpoints_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """Of a checkpoint that does not say which tower was its own, as of a run without one."""
    from megatron_eve.checkpoint.hf.folder import LazyTensor
    from megatron_eve.convert.importing import write_iteration

    assert convert("import", "--source", golden(), "--target", tmp_path / "known") == 0
    known, config = DistFolder(tmp_path / "known" / "iter_0000000"), settings(tmp_path / "known").to_dict()
    for name, change in (("same", 0.0), ("other", 1e-3)):
        tensors = {key: known.tensor(key).clone() for key in known}
        tensors["vision_model.codebook.weight"][0, 3, 5] += change
        lazy = {key: LazyTensor(some.shape, some.dtype, some.clone) for key, some in tensors.items()}
        write_iteration(tmp_path / name, lazy, config, {"frozen": None, "tokenizer": None}, lambda _: None)
    words = ("--target", tmp_path / "back", "--vision-tokenizer", golden() / "vision_tower")
    assert convert("export", "--source", tmp_path / "other", *words) == 2
    assert f"its {CODEBOOK.format(0)} is not that of the checkpoint" in capsys.readouterr().err
    assert convert("export", "--source", tmp_path / "same", *words) == 0


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("llama", (), "is a language model alone; add --vision-tokenizer DIR"),
        ("llama", ("--vision-tokenizer", "nowhere"), "error: --vision-tokenizer nowhere"),
        (
            "llama",
            ("--vision-tokenizer", "tower", *HEAD),
            "has a depth transformer, which is taken; leave the flag out",
        ),
        ("model", ("--vision-tokenizer", "tower"), "is a whole VILA-U, which has that; leave the flag out"),
        ("model", HEAD, "is a whole VILA-U, which has that; leave the flag out"),
        ("model", ("--siglip-config", "llama"), "model_type is 'llama'"),
    ],
)
def test_wrong_imports_are_refused(
    tmp_path: Path, capsys: Capture, source: str, words: tuple[object, ...], message: str
) -> None:
    places = {"tower": golden() / "vision_tower", "model": golden()}
    if source == "llama" or "llama" in words:
        places["llama"] = llama(tmp_path / "llama")
    flags = [places.get(str(word), word) for word in words]
    assert convert(
        "import", "--family", "vila_u", "--source", places[source], "--target", tmp_path / "run", *flags
    ) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("published", [True, False])
def test_a_decoder_of_qwen2_is_in_no_folder(published: bool) -> None:
    config = RunConfig(family="vila_u", model=ModelConfig(add_qkv_bias=True))
    its = find_family("vila_u").hugging_face()
    (told,) = its.check_export(config, published, {"source": "runs/x"})
    assert told.startswith(
        "--source runs/x: its decoder is a Qwen2 (--add-qkv-bias), and folders of VILA-U hold a Ll"
    )
