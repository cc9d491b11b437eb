"""The residual quantiser in evaluation, against its definition; `tests/verification` has the public code's numbers."""

from __future__ import annotations

import pytest
import torch

from megatron_eve.models.vila_u.quantizer import Quantizer


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
