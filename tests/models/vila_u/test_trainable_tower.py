"""The tower in training: its contrastive side against the public code's, and the weights that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.towers.contrast import sigmoid_contrastive
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from megatron_eve.models.vila_u.tower_start import load_siglip, load_tower
from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower
from tests.golden_dir import find_golden
from tests.models.vila_u.test_tower import pictures, relative
from tests.training.tower.towers import SIGLIP, Case, write_siglip

FLAG = "--pretrained-checkpoint"


def golden_tower() -> VILAUTrainableTower:
    """The golden model's, with the text side that its folder holds."""
    model = find_golden("vila/vilau_model")
    settings = read_tower_folder(model / "vision_tower")
    text = json.loads((model / "siglip_config" / "config.json").read_text())["text_config"]
    tower = VILAUTrainableTower(settings, text)
    load_tower(tower, settings, True, FLAG)
    return tower


@torch.no_grad()
def test_texts_and_pictures_are_compared_as_in_the_golden_case() -> None:
    tower, case = golden_tower(), find_golden("vila/vilau_tower")
    side, outputs = load_file(case / "siglip_side.safetensors"), load_file(case / "outputs.safetensors")

    def unit(name: str) -> torch.Tensor:
        return torch.nn.functional.normalize(side[name], dim=-1)

    texts = tower.text_features(side["text_input_ids"])
    quantized = tower.image_features(outputs["z_q"])
    unquantized = tower.image_features(outputs["pre_quant"])
    scale, bias = tower.logit_scale_and_bias()
    assert relative(texts, unit("text_features")) < 5e-6
    assert relative(quantized, unit("derived_pooled_from_zq")) < 5e-6
    assert relative(unquantized, unit("image_features_unquantized")) < 5e-6
    assert relative(scale * texts @ quantized.t() + bias, side["derived_logits_per_text"]) < 5e-6
    assert relative(scale * texts @ unquantized.t() + bias, side["logits_per_text"]) < 5e-6
    assert abs(sigmoid_contrastive(quantized, texts, scale, bias) - side["derived_siglip_loss"]) < 1e-5


def trainable(**changes: Any) -> VILAUTrainableTower:
    return VILAUTrainableTower(Case().settings, SIGLIP["text_config"], **changes)


def test_what_a_loss_does_not_need_is_frozen() -> None:
    def trained(tower: VILAUTrainableTower) -> set[str]:
        return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}

    every = trained(trainable())
    assert not any(name.startswith("text.") for name in every)
    left_out = every - trained(trainable(contrast=False))
    first = ("encoder.encoder.layers.2.", "encoder.post_layernorm.", "encoder.head.", "logit_")
    assert left_out and all(name.startswith(first) for name in left_out)
    left_out = every - trained(trainable(reconstruct=False))
    assert left_out and all(name.startswith(("decoder.", "post_quant_conv.")) for name in left_out)


def test_random_weights_depend_on_the_seed_alone() -> None:
    one, other = trainable(seed=3).state_dict(), trainable(seed=4).state_dict()
    torch.manual_seed(0)
    again = trainable(seed=3).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    for part in ("decoder.conv_in.weight", "quantizer.codebooks.0.weight", "text.head.weight"):
        assert not torch.equal(one[part], other[part])


def test_bfloat16_rounds_neither_codebooks_nor_the_scalars_of_the_logits() -> None:
    tower = trainable()
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.logit_bias.data.fill_(-10.03)
    tower.bfloat16()
    assert tower.logit_bias.dtype == torch.float32 and tower.logit_bias.item() == pytest.approx(-10.03)
    assert torch.equal(tower.quantizer.codebooks[0].weight, before["quantizer.codebooks.0.weight"])
    output = tower(pictures(2, 32), "quantized")
    assert output.pictures.dtype == torch.bfloat16 and output.images.dtype == torch.float32
    assert output.commitment.dtype == torch.float32


def write_weights(folder: Path, tower: VILAUTrainableTower) -> None:
    """The SigLIP of a tower, in transformers' layout."""
    tensors = {}
    for name, tensor in tower.state_dict().items():
        if name.startswith(("encoder.", "text.", "logit_")):
            name = name.replace("text.", "text_model.", 1) if name.startswith("text.") else name
            name = name.replace("encoder.", "vision_model.", 1) if name.startswith("encoder.") else name
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")


def test_it_starts_from_a_siglip(tmp_path: Path) -> None:
    folder, source, tower = write_siglip(tmp_path / "siglip"), trainable(seed=1), trainable(seed=2)
    write_weights(folder, source)
    own = tower.decoder.conv_in.weight.clone()
    load_siglip(tower, folder, "--vision-tower")
    for part in ("encoder", "text"):
        wanted = getattr(source, part).state_dict()
        found = getattr(tower, part).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(tower.decoder.conv_in.weight, own)


def test_a_siglip_without_its_text_side_or_of_another_size_is_refused(tmp_path: Path) -> None:
    folder, tower = write_siglip(tmp_path / "siglip"), trainable()
    write_weights(folder, tower)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "text_model" not in n}, folder / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"--vision-tower \S+: the weights lack text_model\.\S+; name a whole SigLIP"
    ):
        load_siglip(tower, folder, "--vision-tower")
    tensors["logit_bias"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"logit_bias is \[2\] in the weights, and \[1\] by its settings"):
        load_siglip(tower, folder, "--vision-tower")


def test_a_tower_without_its_text_side_is_refused_where_texts_are_compared(tmp_path: Path) -> None:
    from tests.models.vila_u.towers import write_tower

    settings = read_tower_folder(write_tower(tmp_path / "tower"))
    tower = VILAUTrainableTower(settings, SIGLIP["text_config"])
    with pytest.raises(
        ConfigError, match=r"lack rqvaesiglip\.\S*, and pictures are compared with texts; name"
    ):
        load_tower(tower, settings, True, FLAG)
    load_tower(tower, settings, False, FLAG)
    wanted = load_file(settings.folder / "model.safetensors")["rqvaesiglip.quantizer.codebooks.0.weight"]
    assert torch.equal(tower.quantizer.codebooks[0].weight, wanted)
