"""The tower's contrastive side: the published model's vectors, and what its folder may lack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import ConfigError
from megatron_eve.models.vila_u.contrast import load_contrast, load_pictures, text_encoder
from megatron_eve.models.vila_u.golden_towers import case_tower
from megatron_eve.models.vila_u.tower_folder import read_tower_folder, text_folder
from megatron_eve.models.vila_u.tower_weights import TowerWeights
from tests.evaluation.toy_pictures import write_reading_tower
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import write_tower


def test_vectors_of_the_published_model() -> None:
    folder = find_golden("vila/vilau_tower")
    if not (folder / "siglip_side.safetensors").is_file():
        pytest.skip("the case has no siglip_side.safetensors")
    golden = load_file(folder / "siglip_side.safetensors")
    tower = case_tower(folder)
    near = tower.parent / "siglip_config"
    settings = read_tower_folder(tower, near if near.is_dir() else None)
    weights = TowerWeights(settings)
    z_q = load_file(folder / "outputs.safetensors")["z_q"]
    with torch.no_grad():
        texts = text_encoder(settings, weights).eval()(golden["text_input_ids"]).pooler_output
        pooled = load_pictures(settings, weights).eval()(z_q)
    torch.testing.assert_close(texts, golden["text_features"], atol=5e-6, rtol=0)
    torch.testing.assert_close(pooled, golden["derived_pooled_from_zq"], atol=5e-6, rtol=0)


def test_vectors_of_pictures_and_texts(tmp_path: Path) -> None:
    settings = read_tower_folder(write_reading_tower(tmp_path / "tower"))
    tower = load_contrast(settings, text_folder(settings, None), torch.device("cpu"))
    pixels = torch.randint(
        0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pictures = tower.picture_vectors(pixels)
    # Case and punctuation are no part of a text, and one that is too long is cut.
    texts = tower.text_vectors(["A photo of a hen.", "a photo of a hen", "x " * 200])
    assert pictures.shape == texts.shape == (3, 32)
    for found in (pictures, texts):
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert torch.equal(texts[0], texts[1]) and not torch.allclose(texts[0], texts[2], atol=1e-3)
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)


def test_what_a_folder_lacks_is_one_sentence(tmp_path: Path) -> None:
    without = read_tower_folder(write_tower(tmp_path / "without"))
    with pytest.raises(ConfigError, match="--siglip-config: texts need the tokenizer of the tower's SigLIP"):
        text_folder(without, None)
    with pytest.raises(ConfigError, match=r"without has no spiece.model; name the SigLIP's folder"):
        text_folder(without, without.folder)
    with pytest.raises(ConfigError, match="the tower has no text encoder"):
        text_encoder(without, TowerWeights(without))

    whole = read_tower_folder(write_reading_tower(tmp_path / "whole"))
    path, texts = whole.folder / "model.safetensors", text_folder(whole, None)
    assert text_folder(whole, texts / "config.json") == texts
    tensors = load_file(path)
    tokens = "rqvaesiglip.siglip_model.text_model.embeddings.token_embedding.weight"
    tensors[tokens] = tensors[tokens][:100].clone()
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"its tokenizer has \d+ tokens, and the tower's text encoder 100"):
        load_contrast(whole, texts, torch.device("cpu"))
    (texts / "spiece.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match="its tokenizer cannot be read"):
        load_contrast(whole, texts, torch.device("cpu"))
