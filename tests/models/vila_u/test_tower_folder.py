"""config.json of a tower: where the sizes of its SigLIP come from, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from tests.models.vila_u.towers import CONFIG, SIGLIP, changed, write_sizes, write_tower

LAYER = "siglip_model.vision_model.encoder.layers.{}.layer_norm1.bias"


def test_sizes_of_a_folder(tmp_path: Path) -> None:
    tower = read_tower_folder(write_sizes(tmp_path / "model" / "vision_tower"))
    assert (tower.image_size, tower.grid, tower.depth, tower.codebook_size) == (32, (4, 4), 4, 64)
    assert read_tower_folder(tmp_path / "model") == tower  # the model's folder will do


def test_the_siglip_is_named_by_a_flag_known_by_name_or_asked_for(tmp_path: Path) -> None:
    alone = write_sizes(tmp_path / "alone", siglip=None)
    with pytest.raises(
        ConfigError, match=r"its SigLIP is 'someone/siglip-tiny', .* nothing is fetched; .* --siglip-config"
    ):
        read_tower_folder(alone)
    elsewhere = tmp_path / "siglip.json"
    elsewhere.write_text(json.dumps(SIGLIP))
    assert read_tower_folder(alone, elsewhere).encoder.hidden_size == 32
    published = changed(
        CONFIG, pretrained_model="google/siglip-large-patch16-256", latent_shape=[16, 16, 1024], resolution=256,
        code_shape=[16, 16, 4], ch=128, ch_mult=[1, 1, 2, 2, 4], n_embed=16384, z_channels=256, attn_resolutions=[16],
    )  # fmt: skip
    tower = read_tower_folder(write_sizes(tmp_path / "known", published, None))
    assert (tower.encoder.num_layers, tower.encoder.num_attention_heads, tower.grid) == (24, 16, (16, 16))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latent_shape": [8, 8, 32]}, r"latent_shape is \[8, 8, 32\], and its SigLIP gives 4 x 4 features"),
        ({"latent_shape": [4, 4, 24]}, "its SigLIP gives 4 x 4 features of the width 32"),
        ({"code_shape": [3, 4, 4]}, "whose grid does not divide latent_shape"),
        ({"n_embed": 0}, "sizes above 0 are needed"),
        ({"n_embed": [64, 64]}, "4 sizes above 0 are needed"),
        ({"n_embed": [64, 64, 64, 32]}, "with shared_codebook, which needs one size"),
        (
            {"ch_mult": [1, 2]},
            "its decoder makes a picture of 32 pixels from 16 x 16 features, and gets 4 x 4",
        ),
        ({"decoder_latent_shape": [8, 8]}, "from 4 x 4 features, and gets 8 x 8"),
        ({"resolution": 64}, "makes a picture of 64 pixels from 8 x 8 features, and gets 4 x 4"),
        (
            {"rqtransformer": {"block_size": [4, 4, 8]}},
            r"block_size of rqtransformer is \[4, 4, 8\], and .* \[4, 4, 4\]",
        ),
        ({"rqtransformer": {"vocab_size": 65}}, "vocab_size of rqtransformer is 65, and .* has codes of 64"),
        ({"num_res_blocks": -1}, "num_res_blocks is -1, and whole numbers above 0 are needed"),
        ({"code_shape": [4, 4]}, "code_shape is .4, 4., and 3 numbers are needed"),
        ({"ch": 48}, "ch of ddconfig is 48, and its multiples by ch_mult must be multiples of 32"),
        ({"out_ch": 1}, "out_ch of ddconfig is 1, and pictures have 3 channels"),
        ({"resolution": 35}, "resolution of ddconfig is 35, which cannot be halved 3 times"),
    ],
)
def test_sizes_that_do_not_fit_are_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = write_sizes(tmp_path / "tower", changed(CONFIG, **changes))
    with pytest.raises(ConfigError, match=sentence) as error:
        read_tower_folder(folder)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("num_attention_heads", 5, "its SigLIP has 5 attention heads for a width of 32"),
        ("num_hidden_layers", 1, "its SigLIP has 1 layer, and codes are made in front of the last"),
        ("hidden_act", "foo", "its SigLIP's hidden_act is 'foo', and gelu, "),
        ("layer_norm_eps", "x", "its SigLIP's layer_norm_eps is 'x', and a number above 0 is needed"),
    ],
)
def test_a_siglip_that_cannot_be_built_is_one_sentence(
    name: str, value: object, sentence: str, tmp_path: Path
) -> None:
    siglip = {**SIGLIP, "vision_config": {**SIGLIP["vision_config"], name: value}}
    with pytest.raises(ConfigError, match=sentence) as error:
        read_tower_folder(write_sizes(tmp_path / "tower", siglip=siglip))
    assert str(error.value).endswith("name the config.json of its own SigLIP with --siglip-config")


def test_another_folder_is_refused_by_its_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name a model folder"):
        read_tower_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(
        ConfigError, match=r"model_type is 'llama', .* name the folder vision_tower of a VILA-U"
    ):
        read_tower_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not JSON"):
        read_tower_folder(tmp_path)


def test_the_fingerprint_is_of_what_decides_the_codes(tmp_path: Path) -> None:
    def fingerprint(name: str, seed: int = 0, **weights: float) -> str:
        folder = write_tower(tmp_path / name, seed=seed)
        tensors = load_file(folder / "model.safetensors")
        for key, value in weights.items():
            tensors[f"rqvaesiglip.{key}"][0] += value
        save_file(tensors, folder / "model.safetensors")
        return IMAGE_CODES.sha256(read_tower_folder(folder))

    first = fingerprint("first")
    assert fingerprint("same") == first != fingerprint("other", seed=1)
    assert fingerprint("decoder", **{"decoder.conv_in.bias": 1.0}) == first
    assert fingerprint("codebook", **{"quantizer.codebooks.0.weight": 1.0}) != first
    assert (
        fingerprint("last layer", **{LAYER.format(2): 1.0})
        == first
        != fingerprint("layer", **{LAYER.format(1): 1.0})
    )
