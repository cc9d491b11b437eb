"""Initial weights of the front end: those of a published stage 1, whatever the tensor-parallel size and the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_eve.config import ModelConfig, RunConfig, TrainingConfig
from megatron_eve.models.eve.config import EVEConfig
from tests.layouts import ONE, TP2, Layout, parametrize
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

# Wide enough for moments; a vocabulary of 384 rows is padded to 512 at TP 2, and must not move what is drawn.
MODEL = ModelConfig(num_layers=1, hidden_size=256, ffn_hidden_size=64)
VISION = EVEConfig(patch_embedding_size=128)
# What each tensor of the front end sums over; the norms have none, the two embeddings are normal.
FAN_IN = {
    "patch_embedding.patch_embedding.weight": 3 * 14 * 14,
    **{
        f"patch_embedding.{part}_attention.{name}": 128
        for part in ("local", "global")
        for name in ("q.1.weight", "kv.1.weight", "proj.weight", "proj.bias")
    },
    **{f"projector.encoder.linear_fc1.{name}": 128 for name in ("weight", "bias")},
    **{f"projector.encoder.linear_fc2.{name}": 256 for name in ("weight", "bias")},
}
EMBEDDINGS = ("patch_embedding.class_embedding", "patch_embedding.split_embedding")


def config(layout: Layout) -> RunConfig:
    return RunConfig(
        model=MODEL,
        vision=VISION,
        parallel=layout.parallel,
        training=TrainingConfig(transformer_impl="local", seed=3),
    )


def initial(some: RunConfig, as_on_a_gpu: bool = False) -> dict[str, torch.Tensor]:
    """Runs on each rank: the front end's weights as this rank holds them."""
    from megatron_eve.models.build import build_chunks, transformer_config
    from megatron_eve.models.eve.front_end import EVEFrontEnd
    from megatron_eve.models.process_groups import model_parallel

    with model_parallel(some):
        if as_on_a_gpu:  # each rank draws its shards; the accelerator answers calls for CUDA with the CPU
            gpu = replace(transformer_config(some), use_cpu_initialization=False)
            front_end = EVEFrontEnd(gpu, some.vision)
        else:
            front_end = build_chunks(some)[0].vision_model
        return {name: parameter.detach().clone() for name, parameter in front_end.named_parameters()}


def check_distribution(name: str, weights: torch.Tensor, fan_in: int) -> None:
    """U(-b, b) with b = fan_in ** -0.5: within the bound, which it reaches, centred, of variance b * b / 3."""
    bound, count = fan_in**-0.5, weights.numel()
    largest = float(weights.abs().max())
    assert bound * (1 - 12 / count) < largest <= bound, (name, largest, bound)
    assert abs(float(weights.mean())) < 5 * bound / (3 * count) ** 0.5, name
    variance = float(weights.double().square().mean())
    assert variance == pytest.approx(bound**2 / 3, rel=5 * (0.8 / count) ** 0.5), name


@parametrize(ONE, TP2)
@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["cpu", "gpu"])
def test_initial_weights_are_the_published_ones(ranks: RankPool, layout: Layout, as_on_a_gpu: bool) -> None:
    for held in ranks.run(layout.world_size, initial, config(layout), as_on_a_gpu):
        for name, fan_in in FAN_IN.items():
            check_distribution(name, held[name], fan_in)
        for name in EMBEDDINGS:
            assert abs(float(held[name].mean())) < 0.5
            assert 0.7 < float(held[name].std()) < 1.3
        norms = set(held) - set(FAN_IN) - set(EMBEDDINGS)
        assert len(norms) == 8
        assert all(bool((held[name] == float(name.endswith("weight"))).all()) for name in norms)


@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["cpu", "gpu"])
def test_ranks_hold_parts_of_one_front_end(ranks: RankPool, as_on_a_gpu: bool) -> None:
    """Biases and replicated weights agree over tensor-parallel ranks; on the CPU every weight is that of TP 1."""
    (whole,) = ranks.run(1, initial, config(ONE), as_on_a_gpu)
    first, second = ranks.run(2, initial, config(TP2), as_on_a_gpu)
    column, row = (f"projector.encoder.linear_fc{i}" for i in (1, 2))
    for name, weights in whole.items():
        if name.startswith(column):
            merged = torch.cat([first[name], second[name]])
        elif name == f"{row}.weight":
            merged = torch.cat([first[name], second[name]], 1)
        else:
            assert torch.equal(first[name], second[name]), name
            merged = first[name]
        if not as_on_a_gpu or name not in (f"{column}.weight", f"{row}.weight"):
            assert torch.equal(merged, weights), name
    assert not torch.equal(first[f"{row}.weight"], second[f"{row}.weight"])


def test_an_import_begins_alike(ranks: RankPool) -> None:
    """What `convert_checkpoint.py import` gives a language model: the same distributions, of the seed it was told."""
    first, again, other = (ranks.run(1, of_an_import, seed)[0] for seed in (5, 5, 6))
    for name, fan_in in FAN_IN.items():
        check_distribution(name, first[f"vision_model.{name}"], fan_in)
    assert all(torch.equal(weights, again[name]) for name, weights in first.items())
    assert not torch.equal(first[f"vision_model.{EMBEDDINGS[0]}"], other[f"vision_model.{EMBEDDINGS[0]}"])


def of_an_import(seed: int) -> dict[str, torch.Tensor]:
    """Runs on a rank."""
    from megatron_eve.convert.meta_model import MetaModel
    from megatron_eve.models.process_groups import model_parallel

    some = config(ONE)
    with model_parallel(some):
        return MetaModel(some).initial(seed)
