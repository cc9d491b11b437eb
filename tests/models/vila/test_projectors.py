"""Projectors against the published ones: outputs and gradients, on one rank and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.models.vila.config import VILAConfig
from tests.golden_dir import find_golden
from tests.layouts import ONE, TP2, Layout, parametrize
from tests.models.vila.golden_front_end import PROJECTORS, difference, published, put, run_config
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

GRIDS = (4, 5, 6, 7)
WIDTH, DECODER = 12, 20


def compare(layout: Layout, folder: Path) -> dict[str, float]:
    """Runs on each rank: the worst relative difference of each file of the golden case."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila.projectors import build_projector

    config = run_config(DECODER, layout)
    inputs = load_file(folder / "inputs.safetensors")
    worst = {}
    with model_parallel(config):
        for name in (*PROJECTORS, "vila15_mlp_downsample"):
            kind = name.removeprefix("vila15_")
            order: Any = "column" if kind != name else "row"
            vision = replace(settings(kind), projector_token_order=order)
            projector = build_projector(transformer_config(config), vision)
            golden = load_file(folder / f"{name}.safetensors")
            prefix = "weights.layers." if kind != "linear" else "weights.layers"
            put(projector, published(kind, load_file(folder / f"{kind}.safetensors"), prefix))
            differences = []
            for grid in GRIDS:
                features = inputs[f"x_{grid}x{grid}"].requires_grad_()
                rows = projector(features)
                differences.append(difference(rows.detach(), golden[f"y_{grid}x{grid}"]))
                if f"grad_out_{grid}x{grid}" in golden:
                    (gradient,) = torch.autograd.grad(rows, features, golden[f"grad_out_{grid}x{grid}"])
                    differences.append(difference(gradient, golden[f"grad_x_{grid}x{grid}"]))
            worst[name] = max(differences)
    return worst


@parametrize(ONE, TP2)
def test_projectors_are_the_published_ones(ranks: RankPool, layout: Layout) -> None:
    for worst in ranks.run(layout.world_size, compare, layout, find_golden("vila/vila_projectors")):
        assert len(worst) == 7
        assert max(worst.values()) < 1e-6, worst


def of_version_1(folder: Path) -> list[float]:
    """Runs on a rank: VILA 1.0's own projectors."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila.projectors import build_projector

    config = run_config(DECODER)
    golden = load_file(folder / "vila10_projectors.safetensors")
    features = load_file(folder / "inputs.safetensors")["x_4x4"]
    differences = []
    with model_parallel(config):
        for kind, prefix in (("linear", "linear.weights"), ("mlp2x_gelu", "mlp2x_gelu.weights.")):
            projector = build_projector(transformer_config(config), settings(kind))
            put(projector, published(kind, golden, prefix))
            differences.append(difference(projector(features).detach(), golden[f"{kind}.y_4x4"]))
    return differences


def test_names_of_version_1(ranks: RankPool) -> None:
    assert max(ranks.run(1, of_version_1, find_golden("vila/vila_projectors"))[0]) < 1e-6


def blocks_of_positions(grid: int, side: int, by_column: bool) -> torch.Tensor:
    """Runs on a rank: which positions of a grid, counted from 1, are in which block (0: padding)."""
    from megatron_eve.models.vila.projectors import blocks

    return blocks(torch.arange(1.0, grid**2 + 1)[None, :, None], side, by_column)


def test_order_of_blocks(ranks: RankPool) -> None:
    golden = load_file(find_golden("vila/vila_projectors") / "shuffle_order.safetensors")
    for name, expected in golden.items():
        kind, _, grid = name.rpartition("_")
        side = int(kind[5])
        (found,) = ranks.run(1, blocks_of_positions, int(grid), side, False)
        assert torch.equal(found, expected), name
    golden = load_file(find_golden("vila/vila_projectors") / "vila15_mlp_downsample.safetensors")
    for grid in GRIDS:
        (found,) = ranks.run(1, blocks_of_positions, grid, 2, True)
        assert torch.equal(found, golden[f"order_{grid}"]), grid


def gradients(layout: Layout) -> dict[str, tuple[torch.Tensor, int | None]]:
    """Runs on each rank: rows and gradients of every projector, and the dimension that is spread over ranks."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila.projectors import build_projector

    config = run_config(DECODER, layout)
    found: dict[str, tuple[torch.Tensor, int | None]] = {}
    for kind in (*PROJECTORS, "qformer"):
        with model_parallel(config):
            projector = build_projector(transformer_config(config), settings(kind))
            features = torch.randn(3, 25, WIDTH, generator=torch.manual_seed(1)).requires_grad_()
            rows = projector(features)
            rows.square().sum().backward()
            found[f"{kind} rows"] = rows.detach(), None
            found[f"{kind} features"] = features.grad, None
            for name, parameter in projector.named_parameters():
                spread = getattr(parameter, "tensor_model_parallel", False)
                found[f"{kind} {name}"] = parameter.grad, parameter.partition_dim if spread else None
            alone = projector(features[1:2])
            assert difference(alone.detach(), rows[1:2].detach()) < 1e-6  # no row depends on another picture
            projector.zero_grad()
            projector(features[:0]).sum().backward()  # a pack without pictures
            assert all(not parameter.grad.any() for parameter in projector.parameters())  # zero, not missing
    return found


def settings(kind: str) -> VILAConfig:
    """Of the projector of this name."""
    return VILAConfig(
        vision_hidden_size=WIDTH,
        vision_num_attention_heads=3,
        projector_type=kind,  # type: ignore[arg-type]
        qformer_num_queries=5,
    )


def test_two_ranks_have_the_gradients_of_one(ranks: RankPool) -> None:
    """Of features and weights, from the same initial weights; on packs of several, one and no picture."""
    (one,) = ranks.run(1, gradients, ONE)
    assert one["qformer rows"][0].shape == (3, 5, DECODER)
    first, second = ranks.run(2, gradients, TP2)
    assert set(first) == set(one)
    for name, (expected, _) in one.items():
        dim = first[name][1]
        if dim is None:
            assert torch.equal(first[name][0], second[name][0]), name
            whole = first[name][0]
        else:
            whole = torch.cat([first[name][0], second[name][0]], dim)
        if not name.endswith("k_proj.bias"):  # rounding noise: attention does not depend on it
            assert difference(whole, expected) < 5e-6, name
