"""The patch embedding against that of exported folders, which is written as published, and against golden numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from megatron_eve.data.images import cut_patches
from megatron_eve.models.eve import patch_embedding
from megatron_eve.models.eve.hf import modeling_eve
from megatron_eve.models.eve.hf.modeling_eve import EVEVisionTower
from megatron_eve.models.eve.patch_embedding import PatchEmbedding
from megatron_eve.models.image_rows import row_indices
from megatron_eve.models.normalise import normalise
from megatron_eve.models.towers.normalisation import CLIP_MEAN, CLIP_STD
from tests.golden_dir import find_golden

GRIDS = [(3, 4), (1, 5), (4, 1), (1, 1), (2, 2), (5, 3)]
GOLDEN_TOLERANCE = 5e-6  # relative L2, as the golden files state


def images(grids: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    sizes = torch.tensor(grids, dtype=torch.int64).reshape(-1, 2)
    return torch.randn(4 * int(sizes.prod(dim=1).sum()), 588, dtype=dtype), sizes


def pair(width: int = 32, heads: int = 8) -> tuple[PatchEmbedding, EVEVisionTower]:
    """Both implementations with equal weights, norms included, that are not what they start from."""
    torch.manual_seed(2)
    ours, plain = PatchEmbedding(width, heads).double(), EVEVisionTower(width).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def gradients(layer: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert all(gradient is not None for gradient in found.values()), found
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize(("width", "heads", "block"), [(32, 8, 512), (32, 8, 3), (24, 2, 7), (640, 8, 512)])
def test_values_and_gradients_equal_the_plain_layer(
    width: int, heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_embedding, "_CPU_BLOCK", block)
    monkeypatch.setattr(modeling_eve, "_HEADS", heads)  # published folders have 8
    ours, plain = pair(width, heads)
    patches, grids = images(GRIDS)
    rows, expected = ours(patches, grids), plain(patches, GRIDS)
    assert rows.shape == expected.shape == (sum(1 + r * (c + 1) for r, c in GRIDS), width)
    assert relative(rows, expected) < 1e-12
    weight = torch.randn_like(rows)
    (rows * weight).sum().backward()
    (expected * weight).sum().backward()
    found = gradients(ours)
    for name, wanted in gradients(plain).items():
        if (
            name == "local_attention.kv.0.bias"
        ):  # half of it, through the keys, is zero and rounds differently
            torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-11)
        else:
            assert relative(found[name], wanted) < 1e-10, name


def test_gradients_agree_with_finite_differences() -> None:
    ours, _ = pair(16, 4)
    patches, grids = images([(2, 1), (1, 2)])
    weight = torch.randn(9, 16, dtype=torch.float64)
    (ours(patches, grids) * weight).sum().backward()
    for name, parameter in ours.named_parameters():
        direction = torch.randn_like(parameter)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                parameter.add_(direction, alpha=step)
                values.append(float((ours(patches, grids) * weight).sum()))
            parameter.add_(direction, alpha=1e-6)
        assert parameter.grad is not None
        slope = float((parameter.grad * direction).sum())
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_an_image_does_not_see_its_neighbours() -> None:
    ours, _ = pair()
    patches, grids = images(GRIDS)
    together = ours(patches, grids).split([1 + r * (c + 1) for r, c in GRIDS])
    parts = patches.split([4 * r * c for r, c in GRIDS])
    for index, (alone, rows) in enumerate(zip(parts, together, strict=True)):
        torch.testing.assert_close(ours(alone, grids[index : index + 1]), rows, rtol=0, atol=1e-12)


def test_rows_are_cls_then_merged_patches_with_a_row_end() -> None:
    layout = row_indices(torch.tensor([(2, 3), (1, 1), (3, 1)]))
    assert layout.cls_rows.tolist() == [0, 9, 12]
    assert layout.merged_rows.tolist() == [1, 2, 3, 5, 6, 7, 10, 13, 15, 17]
    assert layout.split_rows.tolist() == [4, 8, 11, 14, 16, 18]
    assert layout.images.tolist() == [0] * 6 + [1] + [2] * 3
    ours, _ = pair()
    patches, grids = images([(2, 3), (1, 1), (3, 1)])
    rows = ours(patches, grids)
    assert torch.equal(rows[layout.split_rows], ours.split_embedding.expand(6, -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_no_image_gives_no_row_and_zero_gradients(dtype: torch.dtype) -> None:
    layer = PatchEmbedding(32)
    rows = layer(torch.zeros(0, 588, dtype=dtype), torch.zeros(0, 2, dtype=torch.int64))
    assert rows.shape == (0, 32)
    rows.sum().backward()
    for name, gradient in gradients(layer).items():
        assert not gradient.any(), name


def test_parameters_have_the_published_names_and_shapes() -> None:
    weights = load_file(find_golden("_shared") / "hf_mini224" / "model.safetensors")
    prefix = "model.vision_tower."
    published = {name.removeprefix(prefix): w.shape for name, w in weights.items() if name.startswith(prefix)}
    assert {name: weight.shape for name, weight in PatchEmbedding(32).state_dict().items()} == published


def test_fresh_parameters_are_drawn_as_published() -> None:
    torch.manual_seed(0)
    layer = PatchEmbedding(256)
    for embedding in (layer.class_embedding, layer.split_embedding):
        assert 0.8 < float(embedding.detach().std()) < 1.2
    assert float(layer.patch_embedding.weight.detach().abs().max()) == pytest.approx(588**-0.5, rel=1e-2)
    assert float(layer.local_attention.kv.linear.weight.detach().abs().max()) == pytest.approx(
        256**-0.5, rel=1e-2
    )
    assert layer.local_attention.q.norm.weight.eq(1).all() and layer.local_attention.q.norm.bias.eq(0).all()


def test_pixels_are_normalised_bit_for_bit_as_published() -> None:
    levels = np.arange(256, dtype=np.uint8)
    patches = np.stack([np.roll(np.resize(levels, 588), shift) for shift in range(256)])
    scaled = (patches.reshape(-1, 3, 196) * 0.00392156862745098).astype(np.float32)
    mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (CLIP_MEAN, CLIP_STD))
    expected = ((scaled - mean) / std).reshape(-1, 588)
    found = normalise(torch.from_numpy(patches), torch.float32)
    assert found.dtype == torch.float32 and (found.numpy() == expected).all()


def test_bytes_and_normalised_floats_give_the_same_rows() -> None:
    layer = PatchEmbedding(32)
    patches = torch.randint(0, 256, (8, 588), dtype=torch.uint8)
    grids = torch.tensor([(1, 2)])
    assert torch.equal(layer(patches, grids), layer(normalise(patches, torch.float32), grids))


def test_bfloat16_stays_close_to_float32() -> None:
    layer, _ = pair(64)
    patches, grids = images(GRIDS)
    exact = layer(patches, grids)
    exact.square().sum().backward()
    expected = gradients(layer)
    layer.zero_grad()
    half = layer.bfloat16()
    rows = half(patches.bfloat16(), grids)
    assert rows.dtype == torch.bfloat16 and relative(rows.double(), exact) < 0.01
    rows.square().sum().backward()
    for name, gradient in gradients(half).items():
        assert gradient.dtype == torch.bfloat16
        assert relative(gradient.double(), expected[name]) < 0.05, name


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="width 30 is not divisible by its 8 heads"):
        PatchEmbedding(30)
    with pytest.raises(ValueError, match="conv_stride 3"):
        PatchEmbedding(32, conv_stride=3)
    with pytest.raises(ValueError, match="5 patches came with grids of 2 merged patches"):
        PatchEmbedding(32)(torch.zeros(5, 588), torch.tensor([(1, 2)]))


def test_golden_rows_of_the_published_model() -> None:
    case = find_golden("mini224_mixed")
    weights = load_file(find_golden("_shared") / "hf_mini224" / "model.safetensors")
    outputs, inputs = load_file(case / "outputs.safetensors"), load_file(case / "inputs.safetensors")
    layer = PatchEmbedding(32)
    layer.load_state_dict(
        {
            name.removeprefix("model.vision_tower."): w
            for name, w in weights.items()
            if "vision_tower." in name
        }
    )
    grids = [tuple(grid) for grid in json.loads((case / "meta.json").read_text())["patch_hw"]]
    patches = []
    for index, mask in enumerate(inputs["image_mask_patches"].bool()):
        canvas = np.asarray(Image.open(case / "proc" / f"{index}_eve.png").convert("RGB"))
        inside = mask.nonzero()
        top, left = inside.min(dim=0).values.tolist() if len(inside) else (0, 0)  # an empty mask: no image
        rows, columns = grids[index]
        crop = canvas[14 * top : 14 * top + 28 * rows, 14 * left : 14 * left + 28 * columns]
        patches.append(torch.from_numpy(cut_patches(np.ascontiguousarray(crop), 14, 2)))

    with torch.no_grad():
        lengths = [1 + rows * (columns + 1) for rows, columns in grids]
        parts = layer(torch.cat(patches), torch.tensor(grids)).split(lengths)
        projected = [
            F.linear(
                F.gelu(
                    F.linear(
                        part, weights["model.mm_projector.0.weight"], weights["model.mm_projector.0.bias"]
                    )
                ),
                weights["model.mm_projector.2.weight"],
                weights["model.mm_projector.2.bias"],
            )
            for part in parts
        ]
    for index, (rows, columns) in enumerate(grids):
        merged = parts[index][1:].view(rows, columns + 1, 32)[:, :columns].reshape(-1, 32)
        assert relative(parts[index][:1], outputs[f"pel_class.{index}"]) < GOLDEN_TOLERANCE
        assert relative(merged, outputs[f"pel_local.{index}"]) < GOLDEN_TOLERANCE
        where = outputs["expanded_is_image"][index]
        if where.any():
            assert relative(projected[index], outputs["inputs_embeds"][index][where]) < GOLDEN_TOLERANCE
