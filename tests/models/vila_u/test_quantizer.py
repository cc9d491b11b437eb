"""The residual quantiser in evaluation, against what the public code computed."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.models.vila_u.quantizer import Quantizer
from tests.golden_dir import find_golden


def quantizer_of(case: Mapping[str, torch.Tensor], shared: bool) -> Quantizer:
    """The quantiser of a golden file, with its codebooks."""
    weights = [case[f"before.codebooks.{level}.weight"] for level in range(case["eval_codes"].shape[-1])]
    sizes = tuple(len(weight) - 1 for weight in weights)
    quantizer = Quantizer(tuple(case["x"].shape[1:]), tuple(case["eval_codes"].shape[1:]), sizes, shared)
    for codebook, weight in zip(quantizer.codebooks, weights, strict=True):
        codebook.weight.copy_(weight)
    return quantizer


@pytest.mark.parametrize("name", ["shared_norestart", "separate_restart", "shared_restart_smallbatch"])
def test_codes_features_loss_and_gradient_are_those_of_the_public_code(name: str) -> None:
    case = load_file(find_golden("vila/vilau_quantizer") / f"{name}.safetensors")
    features = case["x"].requires_grad_()
    found = quantizer_of(case, name.startswith("shared"))(features)
    assert torch.equal(found.codes, case["eval_codes"])
    torch.testing.assert_close(found.features, case["eval_z_q"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.commitment_loss, case["eval_loss"], rtol=0, atol=1e-6)
    (0.25 * found.commitment_loss + (found.features * case["grad_weight"]).sum()).backward()
    assert features.grad is not None
    torch.testing.assert_close(features.grad, case["eval_grad_x"], rtol=0, atol=1e-6)


def drawn(
    latent: tuple[int, int, int], code: tuple[int, int, int], sizes: tuple[int, ...], shared: bool
) -> Quantizer:
    generator = torch.Generator().manual_seed(3)
    quantizer = Quantizer(latent, code, sizes, shared)
    for codebook in quantizer.codebooks:
        codebook.weight[:-1].normal_(generator=generator)
    return quantizer


def plain_codes(quantizer: Quantizer, features: torch.Tensor) -> list[list[int]]:
    """Codes of a picture's features [H, W, C] by the definition, a block at a time, in float64."""
    height, width, _ = features.shape
    rows, columns = quantizer.block
    codes = []
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            block = [features[top + y, left + x] for y in range(rows) for x in range(columns)]
            rest, found = torch.cat(block).double(), []
            for codebook in quantizer.codebooks:
                vectors = codebook.weight[:-1].double()
                found.append(int((rest - vectors).square().sum(1).argmin()))
                rest = rest - vectors[found[-1]]
            codes.append(found)
    return codes


@pytest.mark.parametrize(
    ("latent", "code", "sizes", "shared"),
    [
        ((4, 6, 5), (2, 3, 3), (64, 64, 64), True),  # blocks of 2 x 2
        ((4, 6, 5), (4, 2, 2), (32, 48), False),  # blocks of 1 x 3, codebooks of two sizes
        ((3, 3, 8), (3, 3, 4), (64,) * 4, False),
    ],
)
def test_codes_are_those_of_the_definition(
    latent: tuple[int, int, int], code: tuple[int, int, int], sizes: tuple[int, ...], shared: bool
) -> None:
    quantizer = drawn(latent, code, sizes, shared)
    features = torch.randn(2, *latent, generator=torch.Generator().manual_seed(5))
    codes = quantizer.encode(features)
    assert codes.shape == (2, *code)
    for number, picture in enumerate(features):
        assert codes[number].flatten(0, 1).tolist() == plain_codes(quantizer, picture)
    found = quantizer(features)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(quantizer.embed(codes), found.features, rtol=0, atol=1e-6)
    assert torch.equal(quantizer.unfold(quantizer.fold(features)), features)
    errors = [
        (quantizer.embed(codes, depth) - features).square().mean().item() for depth in range(1, code[2] + 1)
    ]
    assert sum(errors) / len(errors) == pytest.approx(found.commitment_loss.item(), rel=1e-5)


def test_of_two_vectors_that_are_equally_near_the_lower_code_is_taken() -> None:
    quantizer = drawn((1, 1, 4), (1, 1, 1), (6,), True)
    quantizer.codebooks[0].weight[4] = quantizer.codebooks[0].weight[2]
    assert quantizer.encode(quantizer.codebooks[0].weight[4].view(1, 1, 1, 4)).item() == 2


def test_codebooks_stay_float32_and_are_saved_for_each_depth() -> None:
    quantizer = drawn((2, 2, 4), (2, 2, 3), (8, 8, 8), True)
    before = quantizer.codebooks[0].weight.clone()
    quantizer.to(torch.bfloat16)
    assert torch.equal(quantizer.codebooks[0].weight, before)
    names = {
        f"codebooks.{d}.{name}" for d in range(3) for name in ("weight", "cluster_size_ema", "embed_ema")
    }
    assert set(quantizer.state_dict()) == names


@pytest.mark.parametrize(
    ("code", "sizes", "shared"),
    [((3, 2, 1), (8,), True), ((2, 2, 2), (8,), True), ((2, 2, 2), (8, 4), True)],
)
def test_sizes_that_do_not_fit_are_refused(
    code: tuple[int, int, int], sizes: tuple[int, ...], shared: bool
) -> None:
    with pytest.raises(ValueError, match=r"do not divide|for 2 depths"):
        Quantizer((4, 4, 4), code, sizes, shared)
