"""The sigmoid loss of pictures and texts: transformers' own, and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_eve.models.towers import contrast
from megatron_eve.models.towers.contrast import retrieval_accuracy, sigmoid_contrastive
from tests.golden_dir import find_golden
from tests.ranks import RankPool

PAIRS, WIDTH = 7, 5
NAMES = "images", "texts", "scale", "bias"


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, texts = (
        torch.nn.functional.normalize(
            torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64), dim=-1
        )
        for _ in range(2)
    )
    scale, bias = torch.tensor(3.7, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    return dict(zip(NAMES, (images, texts, scale, bias), strict=True))


def share_of_rank(slices: list[int], within: bool = False) -> dict[str, Any]:
    """Loss and gradients of this rank's slice; `within`: contrast with the pictures of the rank alone."""
    rank, given = dist.get_rank(), inputs()
    start = sum(slices[:rank])
    for name in ("images", "texts"):
        given[name] = given[name][start : start + slices[rank]].clone()
    for tensor in given.values():
        tensor.requires_grad_()
    gather = contrast.gather_rows
    if within:
        contrast.gather_rows = lambda rows, group: (
            torch.cat([rows.new_zeros(start, WIDTH), rows, rows.new_zeros(PAIRS - start - len(rows), WIDTH)]),
            start,
        )
    try:
        loss = sigmoid_contrastive(*(given[name] for name in NAMES), dist.group.WORLD)
        loss.backward()
    finally:
        contrast.gather_rows = gather
    return {"loss": loss.detach(), **{name: given[name].grad for name in NAMES}}


def of_one_process() -> dict[str, torch.Tensor]:
    """By the definition, a pair at a time."""
    given = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    total = torch.zeros((), dtype=torch.float64)
    for i, text in enumerate(given["texts"]):
        for j, image in enumerate(given["images"]):
            logit = given["scale"] * (text @ image) + given["bias"]
            total = total + torch.log1p(torch.exp(-logit if i == j else logit))
    loss = total / PAIRS
    loss.backward()
    return {"loss": loss.detach(), **{name: given[name].grad for name in NAMES}}  # type: ignore[dict-item]


def together(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([one[name] for one in ranks])
        if name in ("images", "texts")
        else torch.stack([one[name] for one in ranks]).sum()
        for name in ("loss", *NAMES)
    }


@pytest.mark.parametrize("slices", [[7], [3, 4], [1, 4, 2]])
def test_shares_add_up_to_the_loss_and_its_gradients(ranks: RankPool, slices: list[int]) -> None:
    found = together(ranks.run(len(slices), share_of_rank, slices))
    torch.testing.assert_close(found, of_one_process(), rtol=1e-12, atol=1e-13)
    without_group = sigmoid_contrastive(*inputs().values())
    torch.testing.assert_close(without_group, found["loss"], rtol=1e-12, atol=0)


def test_contrast_within_a_rank_alone_is_seen(ranks: RankPool) -> None:
    found, wanted = together(ranks.run(2, share_of_rank, [3, 4], True)), of_one_process()
    assert not any(torch.allclose(found[name], wanted[name], rtol=1e-3) for name in ("loss", *NAMES))


def test_the_golden_loss_of_a_toy_siglip() -> None:
    case = load_file(find_golden("vila/vilau_tower/siglip_side.safetensors"))
    weights = load_file(find_golden("vila/vilau_model/vision_tower") / "model.safetensors")
    scalars = {
        key.rsplit(".", 1)[-1]: tensor
        for key, tensor in weights.items()
        if key.split(".")[-1][:6] == "logit_"
    }
    images, texts = (
        torch.nn.functional.normalize(case[key], dim=-1)
        for key in ("derived_pooled_from_zq", "text_features")
    )
    loss = sigmoid_contrastive(
        images, texts, scalars["logit_scale"].exp().squeeze(), scalars["logit_bias"].squeeze()
    )
    torch.testing.assert_close(loss, case["derived_siglip_loss"], rtol=1e-6, atol=0)


def test_retrieval_counts_own_pairs_both_ways() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 2]]
    assert retrieval_accuracy(images, texts) == (0.5, 0.5)
    assert retrieval_accuracy(images, torch.ones(4, 4)) == (0.25, 0.25)  # chance, where all texts are alike
