"""The tower: codes, quantised features and pictures, against the public code's and against a plain reading of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.vila_u.tower import UnifiedTower, load_tower
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from tests.models.vila_u.towers import CONFIG, SIGLIP, changed, write_tower

CPU = torch.device("cpu")


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance over length, both in L2."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> UnifiedTower:
    """The tower of a folder, on the CPU."""
    return load_tower(read_tower_folder(folder), CPU, dtype)


def pictures(count: int, side: int, seed: int = 1) -> torch.Tensor:
    """uint8 [count, side, side, 3]: blocks of random colours with noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    fine = functional.interpolate(coarse, side) + 0.1 * torch.randn(count, 3, side, side, generator=generator)
    return (fine.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_encoding_is_features_then_codes_and_decoding_is_their_picture(tmp_path: Path) -> None:
    tower = loaded(write_tower(tmp_path / "tower"))
    shown = pictures(3, 32)
    codes = tower.encode(shown)
    assert codes.shape == (3, 4, 4, 4) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 64
    assert torch.equal(codes, tower.quantize(shown).codes)
    decoded = tower.decode(codes)
    assert decoded.shape == shown.shape and float(decoded.min()) >= 0 and float(decoded.max()) <= 255
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert torch.equal(tower.decode(codes, 4), decoded) and not torch.equal(tower.decode(codes, 1), decoded)


# As the published tower of 384 pixels: an odd grid, separate codebooks, and features resized for the decoder.
ODD = changed(
    CONFIG, latent_shape=[3, 3, 32], code_shape=[3, 3, 3], shared_codebook=False, n_embed=[64, 32, 16],
    decoder_latent_shape=[6, 6], resolution=48, attn_resolutions=[6, 12],
)  # fmt: skip
FOLDED = changed(CONFIG, code_shape=[2, 2, 4])


def plain_decoder(
    weights: dict[str, torch.Tensor], features: torch.Tensor, config: dict[str, Any]
) -> torch.Tensor:
    """The pixel decoder by its definition, from the tensors of a folder."""
    section = config["rqvaesiglip"]
    sizes = section["ddconfig"]
    prefix = "rqvaesiglip."

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[f"{prefix}{name}.weight"]
        return functional.conv2d(x, weight, weights[f"{prefix}{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        groups = x.reshape(len(x), 32, -1)
        centred = groups - groups.mean(-1, keepdim=True)
        scaled = (centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).view_as(x)
        shape = (1, -1, 1, 1)
        return scaled * weights[f"{prefix}{name}.weight"].view(shape) + weights[f"{prefix}{name}.bias"].view(
            shape
        )

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        hidden = x
        for number in (1, 2):
            normed = norm(hidden, f"{name}.norm{number}")
            hidden = conv(normed * torch.sigmoid(normed), f"{name}.conv{number}")
        short = f"{name}.nin_shortcut"
        return hidden + (conv(x, short) if f"{prefix}{short}.weight" in weights else x)

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        n, channels, height, width = x.shape
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}").reshape(n, channels, -1) for part in "qkv")
        shares = (torch.einsum("nci,ncj->nij", q, k) / channels**0.5).softmax(-1)
        mixed = torch.einsum("nij,ncj->nci", shares, v).view(n, channels, height, width)
        return x + conv(mixed, f"{name}.proj_out")

    x = features.permute(0, 3, 1, 2)
    if grid := section["decoder_latent_shape"]:
        x = functional.interpolate(x, grid, mode="bilinear", align_corners=False)
    x = conv(conv(x, "post_quant_conv"), "decoder.conv_in")
    x = block(attention(block(x, "decoder.mid.block_1"), "decoder.mid.attn_1"), "decoder.mid.block_2")
    for level in reversed(range(len(sizes["ch_mult"]))):
        for number in range(sizes["num_res_blocks"] + 1):
            x = block(x, f"decoder.up.{level}.block.{number}")
            if f"{prefix}decoder.up.{level}.attn.{number}.q.weight" in weights:
                x = attention(x, f"decoder.up.{level}.attn.{number}")
        if level:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"decoder.up.{level}.upsample.conv")
    normed = norm(x, "decoder.norm_out")
    return conv(normed * torch.sigmoid(normed), "decoder.conv_out")


@pytest.mark.parametrize("config", [CONFIG, ODD, FOLDED], ids=["plain", "odd", "folded"])
def test_decoding_is_that_of_the_definition(config: dict[str, Any], tmp_path: Path) -> None:
    section = config["rqvaesiglip"]
    side, grid = section["ddconfig"]["resolution"], section["latent_shape"][0]
    sizes = SIGLIP["vision_config"] | {"image_size": side, "patch_size": side // grid}
    siglip = {**SIGLIP, "vision_config": sizes}
    folder = write_tower(tmp_path / "tower", config, siglip)
    tower, weights = loaded(folder), load_file(folder / "model.safetensors")
    codes = tower.encode(pictures(2, side))
    assert list(codes.shape[1:]) == config["rqvaesiglip"]["code_shape"]
    features = tower.quantizer.embed(codes)
    assert list(features.shape[1:]) == config["rqvaesiglip"]["latent_shape"]
    plain = plain_decoder(weights, features, config)
    assert relative(tower.decode_features(features), plain) < 5e-6
    wanted = ((plain + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1)
    assert relative(tower.decode(codes), wanted) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_picture_has_the_same_codes_in_batches_of_any_size(dtype: torch.dtype, tmp_path: Path) -> None:
    tower, shown = loaded(write_tower(tmp_path / "tower"), dtype), pictures(1000, 32)
    assert tower.quantizer.codebooks[0].weight.dtype == torch.float32
    assert next(tower.decoder.parameters()).dtype == dtype
    whole = tower.encode(shown)
    for size in (1, 7, 64):
        count = 100 if size == 1 else 1000
        parts = torch.cat([tower.encode(part) for part in shown[:count].split(size)])
        assert torch.equal(parts, whole[:count]), f"in batches of {size}"


def test_a_shared_codebook_may_be_written_once(tmp_path: Path) -> None:
    whole, short = (
        loaded(write_tower(tmp_path / name, copies=copies)) for name, copies in (("a", True), ("b", False))
    )
    shown = pictures(2, 32)
    assert torch.equal(whole.encode(shown), short.encode(shown))


def test_weights_that_are_missing_or_of_another_size_are_named(tmp_path: Path) -> None:
    folder = write_tower(tmp_path / "tower")
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = "rqvaesiglip.decoder.conv_in.bias"
    save_file({key: tensor for key, tensor in weights.items() if key != lost}, file)
    with pytest.raises(ConfigError, match=rf"{folder}: the weights lack {lost}; copy the folder again"):
        loaded(folder)
    book = "rqvaesiglip.quantizer.codebooks.0.weight"
    save_file(weights | {book: torch.zeros(33, 32)}, file)
    with pytest.raises(ConfigError, match=r"codebooks.0.weight is \[33, 32\] .* settings say \[65, 32\]"):
        loaded(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model.safetensors: cannot be read"):
        loaded(folder)
    file.unlink()
    with pytest.raises(ConfigError, match=r"holds no weights"):
        loaded(folder)
