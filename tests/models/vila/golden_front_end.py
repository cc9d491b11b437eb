"""VILA's front ends with the weights of golden cases, built on a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_eve.config import ModelConfig, RunConfig, TrainingConfig
from megatron_eve.models.vila.config import VILAConfig
from tests.layouts import ONE, Layout

# Of vila10_llm (CLIP, mlp2x_gelu) and vila15_llm (SigLIP, mlp_downsample).
# vila15_llm's grid of 5 x 5 features is not divisible by blocks of 2 x 2: 9 rows a picture, column by column.
CLIP = VILAConfig(image_size=28, vision_patch_size=7, vision_hidden_size=24, vision_num_layers=3)
SIGLIP = VILAConfig(
    vision_model_type="siglip",
    image_size=35,
    vision_patch_size=7,
    vision_hidden_size=24,
    vision_num_layers=3,
    vision_hidden_act="gelu_pytorch_tanh",
    vision_norm_epsilon=1e-6,
    projector_type="mlp_downsample",
    projector_token_order="column",
)
# Where the published names of projectors lie in ours.
MLP = {"0": "encoder.linear_fc1", "2": "encoder.linear_fc2"}
DOWNSAMPLE = {"1": "norm", "2": "encoder.linear_fc1", "4": "encoder.linear_fc2"}
PROJECTORS = {
    "linear": {"": "encoder"},
    "mlp2x_gelu": MLP,
    "mlp3x_gelu": {"0": "input", "2": "encoder.linear_fc1", "4": "encoder.linear_fc2"},
    "mlp_downsample": DOWNSAMPLE,
    "mlp_downsample_2x2_fix": DOWNSAMPLE,
    "mlp_downsample_3x3_fix": {
        "1": "norm",
        "2": "reduction",
        "4": "reduced_norm",
        "5": "encoder.linear_fc1",
        "7": "encoder.linear_fc2",
    },
}


def run_config(hidden_size: int, layout: Layout = ONE, **training: Any) -> RunConfig:
    """The decoder around a front end, which is not built."""
    return RunConfig(
        model=ModelConfig(num_layers=1, hidden_size=hidden_size, ffn_hidden_size=64),
        parallel=layout.parallel,
        training=TrainingConfig(transformer_impl="local", seed=3, **training),
    )


def put(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give a module all its weights: whole tensors, of which a rank takes its part."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(weights), set(parameters) ^ set(weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            dim = getattr(parameter, "partition_dim", -1)
            spread = getattr(parameter, "tensor_model_parallel", False)
            size = parallel_state.get_tensor_model_parallel_world_size()
            whole = weights[name]
            parameter.copy_(whole.chunk(size, dim)[rank] if spread else whole)


def published(projector: str, weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Weights of a projector by our names, from those that begin with `prefix`."""
    ours = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            layer, _, kind = name.removeprefix(prefix).rpartition(".")
            ours[f"{PROJECTORS[projector][layer]}.{kind}"] = tensor
    return ours


def front_end_weights(case: Path) -> dict[str, torch.Tensor]:
    """Weights of the front end of vila10_llm or vila15_llm, by our names."""
    if (case / "model" / "vision_tower").exists():
        tower = load_file(case / "model" / "vision_tower" / "model.safetensors")
        projector = load_file(case / "model" / "mm_projector" / "model.safetensors")
        found = published("mlp_downsample", projector, "layers.")
        prefix = "vision_model."
    else:
        tower = load_file(case / "model" / "model.safetensors")
        found = published("mlp2x_gelu", tower, "model.mm_projector.")
        prefix = "model.vision_tower.vision_tower.vision_model."
    weights = {f"projector.{name}": tensor for name, tensor in found.items()}
    return weights | {
        f"tower.{name.removeprefix(prefix)}": tensor
        for name, tensor in tower.items()
        if name.startswith(prefix)
    }


def pictures(pixels: torch.Tensor, model_type: str) -> torch.Tensor:
    """uint8 [i, S, S, 3] of normalised pixels [i, 3, S, S]."""
    from megatron_eve.models.towers.normalisation import NORMALISATION

    mean, std = (torch.tensor(values) for values in NORMALISATION[model_type])
    return ((pixels.permute(0, 2, 3, 1) * std + mean) * 255).round().byte()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.double() - expected.double()).norm() / expected.double().norm())
