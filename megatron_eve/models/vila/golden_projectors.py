"""VILA's golden case of the projectors alone: rows and gradients by type, and the order of blocks. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_eve.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_eve.models.build import transformer_config
from megatron_eve.models.golden_format import Comparison
from megatron_eve.models.name_rules import rule_for
from megatron_eve.models.vila.config import ProjectorType, VILAConfig
from megatron_eve.models.vila.hf.layouts import PROJECTOR_KEYS
from megatron_eve.models.vila.names import rules
from megatron_eve.models.vila.projectors import blocks, build_projector
from megatron_eve.runtime.accelerator import accelerator

Tensors = Mapping[str, torch.Tensor]
_SIDES = range(4, 8)  # of the grids of the case


class _Variant(NamedTuple):
    """A projector of the case.

    Attributes:
        name: of its rows.
        kind: its type.
        order: of the rows of a picture.
        outputs: names of its tensors begin with a place of their own.
        weights: by the key behind `mm_projector.` in a flat folder.
    """

    name: str
    kind: ProjectorType
    order: Literal["row", "column"]
    outputs: Tensors
    weights: Tensors


def projector_comparisons(folder: Path) -> Iterator[Comparison]:
    """Rows, gradients of the features, and the order of blocks. Collective over tensor-parallel ranks."""
    inputs = load_file(folder / "inputs.safetensors")
    for variant in _variants(folder):
        for side in _SIDES:
            at = f"{side}x{side}"
            if f"y_{at}" not in variant.outputs:
                continue
            features = inputs[f"x_{at}"].clone().to(accelerator().device).requires_grad_()
            golden = variant.outputs[f"y_{at}"]
            rows = _projector(variant, side, features.shape[-1], golden.shape[-1])(features)
            yield Comparison(f"{variant.name}.y_{at}", rows.detach(), golden, "activation")
            if (gradient := variant.outputs.get(f"grad_out_{at}")) is not None:
                rows.backward(gradient.to(rows))
                assert features.grad is not None
                expected = variant.outputs[f"grad_x_{at}"]
                yield Comparison(f"{variant.name}.grad_x_{at}", features.grad, expected, "gradient")
    yield from _orders(folder)


def _variants(folder: Path) -> Iterator[_Variant]:
    for kind in get_args(ProjectorType):
        path = folder / f"{kind}.safetensors"
        if path.is_file():
            tensors = load_file(path)
            weights = _below("weights.layers.", tensors)
            yield _Variant(kind, kind, "row", tensors, weights)
            older = folder / f"vila15_{kind}.safetensors"
            if older.is_file():
                yield _Variant(older.stem, kind, "column", load_file(older), weights)
    older = folder / "vila10_projectors.safetensors"
    if older.is_file():
        tensors = load_file(older)
        for kind in get_args(ProjectorType):
            if weights := _below(f"{kind}.weights.", tensors):
                yield _Variant(f"vila10_{kind}", kind, "row", _below(f"{kind}.", tensors), weights)


def _below(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _projector(variant: _Variant, side: int, width: int, decoder_width: int) -> torch.nn.Module:
    """The projector over a grid of `side`, with the case's weights."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = RunConfig(
        model=ModelConfig(hidden_size=decoder_width),
        parallel=ParallelConfig(tensor_model_parallel_size=size),
    )
    vision = VILAConfig(
        image_size=side,
        vision_patch_size=1,
        vision_hidden_size=width,
        projector_type=variant.kind,
        projector_token_order=variant.order,
    )
    projector = build_projector(transformer_config(config), vision).to(accelerator().device)
    names = rules(variant.kind)
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            rule, (key,) = rule_for(f"vision_model.projector.{name}", names)
            whole = variant.weights[key.removeprefix(PROJECTOR_KEYS)]
            parameter.copy_(rule.layout.shard(whole, rank, size))
    return projector


def _orders(folder: Path) -> Iterator[Comparison]:
    """Blocks of a grid that holds 1, 2, 3 ... row by row, in both orders."""
    files = {"shuffle_order": "block{0}x{0}_fix_{1}", "vila15_mlp_downsample": "order_{1}"}
    for stem, pattern in files.items():
        path = folder / f"{stem}.safetensors"
        tensors: dict[str, Any] = load_file(path) if path.is_file() else {}
        for block in (2, 3):
            for side in _SIDES:
                key = pattern.format(block, side)
                if key not in tensors or tensors[key].shape[-1] != block**2:
                    continue
                grid = torch.arange(1, side**2 + 1, dtype=torch.float32).view(1, side**2, 1)
                ours = blocks(grid, block, by_column=stem.startswith("vila15"))
                yield Comparison(f"{stem}.{key}", ours, tensors[key], "exact")
