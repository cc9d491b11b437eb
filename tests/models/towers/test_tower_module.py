"""The vision tower as a part of the model: names, beginning, pixels, what runs and what is frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_eve.models.towers.normalisation import NORMALISATION
from megatron_eve.models.towers.tower_module import TowerSettings
from tests.layouts import ONE, TP2
from tests.models.vila.golden_front_end import run_config
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

CLIP = TowerSettings(
    model_type="clip",
    side=30,  # two pixels more than its patches
    patch_size=7,
    hidden_size=24,
    num_layers=3,
    num_attention_heads=4,
    ffn_hidden_size=48,
    hidden_act="quick_gelu",
    norm_epsilon=1e-5,
    layers_run=2,
)
SIGLIP = replace(CLIP, model_type="siglip", hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-6)

LAYER = [
    f"{part}.{kind}"
    for part in (
        *(f"self_attn.{letter}_proj" for letter in "qkv"),
        "self_attn.out_proj",
        "layer_norm1",
        "mlp.fc1",
        "mlp.fc2",
        "layer_norm2",
    )
    for kind in ("weight", "bias")
]
COMMON = [
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "post_layernorm.weight",
    "post_layernorm.bias",
    *(f"encoder.layers.{i}.{name}" for i in range(3) for name in LAYER),
]
# As published folders call them, without the leading "vision_model.".
NAMES = {
    "clip": {*COMMON, "embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias"},
    "siglip": {
        *COMMON,
        "embeddings.patch_embedding.bias",
        *(f"head.{name}" for name in ("probe", "attention.in_proj_weight", "attention.in_proj_bias")),
        *(
            f"head.{part}.{kind}"
            for part in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        ),
    },
}


def build(settings: TowerSettings, config: Any) -> Any:
    """A tower on a rank, inside `model_parallel`."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.towers.tower_module import VisionTower

    return VisionTower(transformer_config(config), settings)


def looked_at(settings: TowerSettings) -> dict[str, Any]:
    """Runs on a rank: everything that the tests below ask of a tower."""
    from megatron_eve.models.process_groups import model_parallel

    config = run_config(48)
    found: dict[str, Any] = {}
    with model_parallel(config):
        tower = build(settings, config)
        found["names"] = {name for name, _ in tower.named_parameters()}
        found["state"] = set(tower.state_dict())
        sharded = tower.sharded_state_dict(prefix="vision_model.tower.")
        found["keys"] = {entry.key.removeprefix("vision_model.tower.") for entry in sharded.values()}
        found["frozen"] = {
            name for name, parameter in tower.named_parameters() if not parameter.requires_grad
        }
        found["never run"] = {name for name, _ in tower.never_run()}
        with torch.device("meta"):
            found["meta"] = {name: p.device.type for name, p in build(settings, config).named_parameters()}
        pictures = torch.randint(
            0, 256, (2, settings.side, settings.side, 3), dtype=torch.uint8, generator=torch.manual_seed(1)
        )
        found["pictures"] = pictures
        found["pixels"] = tower._normalised(pictures)
        features = found["features"] = tower(pictures)
        features.square().sum().backward()
        found["gradients"] = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
        weights = {name: p.detach() for name, p in tower.named_parameters()}
        found["plain"] = plain_states(settings, weights, found["pixels"])
        found["features"] = features.detach()
        none = tower(pictures[:0])
        found["none"] = none.shape, none.requires_grad
        tower.requires_grad_(False)
        found["frozen features"] = tower(pictures), tower(pictures[:0])
    config = run_config(48, bf16=True)
    with model_parallel(config):
        tower = build(settings, config)
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                parameter.copy_(weights[name])
        found["bf16"] = tower(pictures).detach()
    return found


def plain_states(
    settings: TowerSettings, weights: dict[str, torch.Tensor], pixels: torch.Tensor
) -> list[torch.Tensor]:
    """All hidden states of transformers' own model with these weights."""
    from megatron_eve.models.towers.tower_module import _transformers_tower

    model = _transformers_tower(settings).eval()
    model.load_state_dict(weights)
    states: list[torch.Tensor] = []
    layers = model.encoder.layers
    # Version 4.57 gives hidden states of some towers only to the wrapper around them.
    layers[0].register_forward_pre_hook(
        lambda _, arguments, named: states.append(arguments[0] if arguments else named["hidden_states"]),
        with_kwargs=True,
    )
    for layer in layers:
        layer.register_forward_hook(
            lambda _, __, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(pixel_values=pixels)
    return states


@pytest.fixture(scope="module", params=[CLIP, SIGLIP], ids=["clip", "siglip"])
def tower(request: pytest.FixtureRequest, ranks: RankPool) -> tuple[TowerSettings, dict[str, Any]]:
    return request.param, ranks.run(1, looked_at, request.param)[0]


def test_names_are_the_published_ones(tower: tuple[TowerSettings, dict[str, Any]]) -> None:
    """Of parameters, of the state, of checkpoints; whatever transformers calls them."""
    settings, found = tower
    assert found["names"] == found["state"] == found["keys"] == NAMES[settings.model_type]
    assert set(found["meta"]) == NAMES[settings.model_type] and set(found["meta"].values()) == {"meta"}


def test_what_is_never_run_is_frozen(tower: tuple[TowerSettings, dict[str, Any]]) -> None:
    _, found = tower
    expected = {
        name for name in found["names"] if name.startswith(("encoder.layers.2.", "post_layernorm.", "head."))
    }
    assert found["frozen"] == found["never run"] == expected
    assert set(found["gradients"]) == found["names"] - expected


def test_features_are_the_selected_hidden_state(tower: tuple[TowerSettings, dict[str, Any]]) -> None:
    _, found = tower
    assert len(found["plain"]) == 4
    assert found["features"].shape == (2, 16, 24)
    torch.testing.assert_close(found["features"], found["plain"][2][:, -16:], atol=1e-6, rtol=1e-6)
    assert found["bf16"].dtype == torch.bfloat16
    torch.testing.assert_close(found["bf16"].float(), found["features"], atol=0.05, rtol=0.05)


def test_without_pictures(tower: tuple[TowerSettings, dict[str, Any]]) -> None:
    """No features; frozen, the tower knows nothing of gradients."""
    _, found = tower
    assert found["none"] == ((0, 16, 24), True)
    for features, count in zip(found["frozen features"], (2, 0), strict=True):
        assert features.shape == (count, 16, 24) and not features.requires_grad


def test_pixels_are_the_published_ones(tower: tuple[TowerSettings, dict[str, Any]]) -> None:
    """x * (1 / 255), rounded to float32, minus mean, over deviation, to the bit."""
    settings, found = tower
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION[settings.model_type])
    scaled = (found["pictures"].permute(0, 3, 1, 2).double() * (1 / 255)).float()
    assert torch.equal(found["pixels"], (scaled - mean) / std)
    every = torch.arange(256)
    assert torch.equal((every.double() * (1 / 255)).float(), every.float() / 255)


def other_states(layers_run: int, recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs on a rank: features and gradients of a CLIP tower under other settings."""
    from megatron_eve.models.process_groups import model_parallel

    config = run_config(48)
    with model_parallel(config):
        tower = build(replace(CLIP, layers_run=layers_run, recompute=recompute), config)
        pictures = torch.randint(0, 256, (2, 30, 30, 3), dtype=torch.uint8, generator=torch.manual_seed(1))
        features = tower(pictures)
        features.square().sum().backward()
        gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
        return features.detach(), gradients


def test_other_hidden_states(ranks: RankPool) -> None:
    """0 is what the first layer gets, behind CLIP's norm; the last one is the last layer's output, without a norm."""
    plain = ranks.run(1, looked_at, CLIP)[0]["plain"]
    for layers_run in (0, 3):
        features, gradients = ranks.run(1, other_states, layers_run, False)[0]
        torch.testing.assert_close(features, plain[layers_run][:, -16:], atol=1e-6, rtol=1e-6)
        assert any(name.startswith("encoder.layers.2") for name in gradients) == (layers_run == 3)


def test_recompute_changes_no_bit(ranks: RankPool) -> None:
    kept, recomputed = (ranks.run(1, other_states, 2, recompute)[0] for recompute in (False, True))
    assert torch.equal(kept[0], recomputed[0])
    assert set(kept[1]) == set(recomputed[1])
    assert all(torch.equal(gradient, recomputed[1][name]) for name, gradient in kept[1].items())


def initial(tensor_parallel: bool, as_on_a_gpu: bool) -> dict[str, torch.Tensor]:
    """Runs on each rank: initial weights of a front end with this tower."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.towers.tower_module import VisionTower

    config = run_config(48, TP2 if tensor_parallel else ONE)
    with model_parallel(config):
        transformer = replace(transformer_config(config), use_cpu_initialization=not as_on_a_gpu)
        return {name: p.detach() for name, p in VisionTower(transformer, CLIP).named_parameters()}


@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["cpu", "gpu"])
def test_ranks_begin_alike(ranks: RankPool, as_on_a_gpu: bool) -> None:
    (one,) = ranks.run(1, initial, False, as_on_a_gpu)
    assert all(one[name].any() for name in NAMES["clip"] if name.endswith("proj.weight"))
    for two in ranks.run(2, initial, True, as_on_a_gpu):
        assert all(torch.equal(weights, two[name]) for name, weights in one.items())
