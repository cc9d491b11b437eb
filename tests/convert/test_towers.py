"""Towers that make codes of pictures: published folders to checkpoints and back, every tensor and byte of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.models.dist_folder import DistFolder
from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from tests.convert.test_conversion import convert
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import CONFIG, SIGLIP, changed, write_tower

Capture = pytest.CaptureFixture[str]
# Like the tower of 384 pixels: features that are resized for the decoder, which makes a picture of another side than
# the encoder reads, and blocks of features that become one vector.
RESIZED = changed(
    CONFIG, shared_codebook=False, n_embed=[64, 32, 48], code_shape=[2, 2, 3], decoder_latent_shape=[6, 6],
    resolution=48, attn_resolutions=[6],
)  # fmt: skip
TENSORS = {
    "siglip_model.text_model.final_layer_norm.weight": torch.arange(5.0),
    "siglip_model.vision_model.embeddings.position_ids": torch.arange(16)[None],
    "logit_scale": torch.tensor([2.0]),
    "siglip_model.logit_scale": torch.tensor([2.0]),
}


def with_others(folder: Path) -> Path:
    """A tower's folder with what codes do not use: text tower, positions, scalars, the head of a decoder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors |= {f"rqvaesiglip.{name}": tensor.clone() for name, tensor in TENSORS.items()}
    tensors["rqtransformer.pos_emb_d"] = torch.ones(1, 4, 8)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": 32}}))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        key: some for path in sorted(folder.glob("*.safetensors")) for key, some in load_file(path).items()
    }


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and torch.equal(ours[key], tensor), key


def round_trip(source: Path, place: Path, *flags: object) -> Path:
    """Import and export; the exported folder."""
    assert convert("import", "--source", source, "--target", place / "run", *flags) == 0
    assert convert("export", "--source", place / "run", "--target", place / "out") == 0
    return place / "out"


def test_the_golden_tower_comes_back_with_every_key_and_byte(tmp_path: Path, capsys: Capture) -> None:
    model = find_golden("vila/vilau_model")
    out = round_trip(model / "vision_tower", tmp_path)
    assert "308 tensors" in capsys.readouterr().out
    published, ours = tensors_of(model / "vision_tower"), tensors_of(out)
    first = "rqvaesiglip.quantizer.codebooks.0."
    for key in [key for key in published if key.startswith(first)]:  # what newer writers leave out
        for level in (1, 2, 3):
            published[key.replace(".0.", f".{level}.")] = published[key]
    for name in ("logit_scale", "logit_bias"):
        published[f"rqvaesiglip.siglip_model.{name}"] = published[f"rqvaesiglip.{name}"]
    assert_same(ours, published)
    for name in ("config.json", "preprocessor_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((model / "vision_tower" / name).read_text())
    # With its copies it makes the same checkpoint.
    siglip = ("--siglip-config", model / "siglip_config")
    assert convert("import", "--source", out, "--target", tmp_path / "again", *siglip) == 0
    first_run, second = (DistFolder(tmp_path / name / "iter_0000000") for name in ("run", "again"))
    assert set(first_run) == set(second) and len(set(first_run)) == 308
    assert all(torch.equal(first_run.tensor(key).clone(), second.tensor(key)) for key in first_run)


@pytest.mark.parametrize("config", [CONFIG, RESIZED], ids=["shared", "separate-resized"])
@pytest.mark.parametrize("copies", [True, False])
def test_a_checkpoint_is_the_tower(config: dict[str, Any], copies: bool, tmp_path: Path) -> None:
    from megatron_eve.models.vila_u.tower import load_tower

    shared = config["rqvaesiglip"]["shared_codebook"]
    source = with_others(write_tower(tmp_path / "tower", config, copies=copies or not shared))
    out = round_trip(source, tmp_path)
    theirs = tensors_of(source)
    if shared and not copies:
        for name in ("weight", "cluster_size_ema", "embed_ema"):
            for level in (1, 2, 3):
                key = f"rqvaesiglip.quantizer.codebooks.{level}.{name}"
                theirs[key] = theirs[f"rqvaesiglip.quantizer.codebooks.0.{name}"]
    assert_same(tensors_of(out), theirs)
    # Named by its folder or by one checkpoint in it, it has the same sizes, fingerprint and codes.
    towers = [read_tower_folder(place) for place in (source, tmp_path / "run", tmp_path / "run/iter_0000000")]
    assert len({IMAGE_CODES.sha256(tower) for tower in towers}) == 1
    pixels = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    published, imported, _ = (load_tower(tower, torch.device("cpu"), torch.float32) for tower in towers)
    codes = published.encode(pixels)
    assert torch.equal(codes, imported.encode(pixels))
    assert torch.equal(published.decode(codes), imported.decode(codes))
    side = config["rqvaesiglip"]["ddconfig"]["resolution"]
    assert published.decode(codes).shape == (5, side, side, 3)


def test_shards_and_pickles_are_read(tmp_path: Path) -> None:
    source = with_others(write_tower(tmp_path / "tower"))
    whole = round_trip(source, tmp_path / "whole")
    tensors = tensors_of(source)
    for kind in ("pickle", "shards"):
        folder = tmp_path / kind
        shutil.copytree(source, folder / "tower")
        (folder / "tower" / "model.safetensors").unlink()
        if kind == "pickle":
            torch.save(tensors, folder / "tower" / "pytorch_model.bin")
        else:
            names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
            for name in set(names.values()):
                save_file({key: tensors[key] for key in names if names[key] == name}, folder / "tower" / name)
            index = {"metadata": {}, "weight_map": names}
            (folder / "tower" / "model.safetensors.index.json").write_text(json.dumps(index))
        assert_same(tensors_of(round_trip(folder / "tower", folder)), tensors_of(whole))
        towers = [read_tower_folder(place / "run") for place in (folder, tmp_path / "whole")]
        assert IMAGE_CODES.sha256(towers[0]) == IMAGE_CODES.sha256(towers[1])


def test_codebooks_and_whole_numbers_keep_their_dtype(tmp_path: Path) -> None:
    source = with_others(write_tower(tmp_path / "tower"))
    ours, theirs = tensors_of(round_trip(source, tmp_path, "--dtype", "bfloat16")), tensors_of(source)
    for key, tensor in theirs.items():
        kept = "codebooks" in key or not tensor.is_floating_point()
        assert torch.equal(ours[key], tensor if kept else tensor.bfloat16()), key
    assert (
        convert(
            "export",
            "--source",
            tmp_path / "run",
            "--target",
            tmp_path / "sharded",
            "--max-shard-size",
            "20KB",
        )
        == 0
    )
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert_same(tensors_of(tmp_path / "sharded"), ours)


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path: Path, capsys: Capture) -> None:
    tower = with_others(write_tower(tmp_path / "model" / "vision_tower"))
    assert convert("import", "--source", tower, "--target", tmp_path / "run") == 0
    capsys.readouterr()

    def spoilt(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(tower, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    conv, book = "rqvaesiglip.post_quant_conv.bias", "rqvaesiglip.quantizer.codebooks.{}.weight"
    lacking = spoilt("lacking", lambda tensors: tensors.pop(conv))
    other = spoilt("other", lambda tensors: tensors.update({"rqvaesiglip.more": torch.ones(1)}))
    shape = spoilt("shape", lambda tensors: tensors.update({conv: torch.ones(7)}))
    nan = spoilt("nan", lambda tensors: tensors[conv].fill_(float("nan")))
    copy = spoilt("copy", lambda tensors: tensors[book.format(2)][0].add_(1))
    deeper = spoilt("deeper", lambda tensors: tensors.pop(book.format(3)))
    new, run = tmp_path / "new", tmp_path / "run"
    for words, says in (
        (("import", "--source", lacking), f"has no tensor {conv}; this is not a whole tower"),
        (("import", "--source", deeper), f"holds {book.format(0)} 3 times, and its config.json asks for 4"),
        (("import", "--source", other), "1 tensors of unknown names (rqvaesiglip.more)"),
        (("import", "--source", shape), f"{conv} is (7,) in the weights, and its config.json says (32,)"),
        (("import", "--source", nan), f"{conv} holds values that are not finite"),
        (("import", "--source", copy), f"{book.format(2)} should be a copy of {book.format(0)} and differs"),
        (
            ("import", "--source", tower, "--family", "eve"),
            "is a tower of the family vila_u; leave --family out",
        ),
        (("import", "--source", tower, "--seed", "7"), "--seed: "),
        (("import", "--source", run), "is a checkpoint already; name a published folder"),
        (("import", "--source", tower, "--target", run), "holds a run already"),
        (("export", "--source", tower), "is a model in Hugging Face layout already"),
        (("export", "--source", run, "--format", "adapter"), "--format adapter: a tower has no adapters"),
        (("export", "--source", run, "--tokenizer", tower), "--tokenizer: "),
        (("export", "--source", run, "--max-shard-size", "much"), "--max-shard-size much: is no size"),
        (("export", "--source", run, "--ckpt-step", "5"), "5"),
    ):
        target = () if "--target" in words else ("--target", new)
        assert convert(*words, *target) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error, error
        assert not new.exists() and not list(tmp_path.glob("new.*"))
    damaged = next((run / "iter_0000000").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert convert("export", "--source", run, "--target", new) == 2
    assert "so this checkpoint is not whole" in capsys.readouterr().err and not new.exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    tower = write_tower(tmp_path / "tower")
    assert convert("import", "--source", tower, "--target", tmp_path / "run", "--dry-run") == 0
    assert "nothing is written (--dry-run)" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_the_siglip_may_be_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    tower = write_tower(tmp_path / "tower")
    (tmp_path / "siglip.json").write_text(json.dumps(SIGLIP))
    shutil.rmtree(tower / "siglip-tiny")
    words = ("import", "--source", tower, "--target", tmp_path / "run")
    assert convert(*words) == 2
    assert "whose sizes are not known here, and nothing is fetched" in capsys.readouterr().err
    assert convert(*words, "--siglip-config", tmp_path / "siglip.json") == 0
    assert read_tower_folder(tmp_path / "run").encoder.hidden_size == 32  # kept in the checkpoint
