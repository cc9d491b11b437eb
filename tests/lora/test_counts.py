"""What adapters cost: parameters, bytes of gradients and optimizer state, FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from megatron_eve.config import ModelConfig, RunConfig
from megatron_eve.config.lora_checks import adapter_parameters
from megatron_eve.config.memory import rank_memory
from megatron_eve.models.model_parts import Work
from megatron_eve.models.registry import find_family
from megatron_eve.training.monitoring.flops import adapter_flops, model_flops
from tests.layouts import ONE, PP2, TP2, Layout, parametrize
from tests.lora.runs import LORA, MODEL, lora_config
from tests.ranks import RankPool

WORK = Work(tokens=13, attended=61, labels=4, images=1, merged_patches=4, image_rows=7)


@dataclass
class Held:
    """Numbers of a rank: elements of what trains by part, and bytes of gradient buffers and optimizer state."""

    adapters: int
    others: dict[str, int]
    gradients: int
    moments: int


def held(config: RunConfig) -> Held:
    """Runs on each rank."""
    from megatron_eve.models.build import unwrap
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        train_one(trainer)
        trainer.loader.close()
        named = [pair for chunk in trainer.chunks for pair in unwrap(chunk).named_parameters()]
        trained = {name: p.numel() for name, p in named if p.requires_grad}
        optimizers = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        states = [state for some in optimizers for state in some.optimizer.state.values()]
        return Held(
            adapters=sum(count for name, count in trained.items() if ".lora." in name),
            others={name: count for name, count in trained.items() if ".lora." not in name},
            gradients=sum(b.grad_data.nbytes for c in trainer.chunks for b in c.buffers),
            moments=sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
        )


@pytest.mark.distributed
@parametrize(ONE, TP2, slow=(PP2,))
def test_buffers_and_state_are_those_of_what_trains(ranks: RankPool, layout: Layout) -> None:
    """Of adapters and front end alone, in bytes; and the memory that the start of a run counts is what it takes."""
    parallel = replace(layout.parallel, use_distributed_optimizer=False)
    config = lora_config(parallel, 1)
    found = ranks.run(layout.world_size, held, config)
    expected = rank_memory(config, layout.world_size)
    for one in found:
        assert all(name.startswith("vision_model.") for name in one.others)
        elements = one.adapters + sum(one.others.values())
        assert one.moments == 8 * elements
        assert one.gradients == 4 * elements
    stages = layout.parallel.pipeline_model_parallel_size
    tensor = layout.parallel.tensor_model_parallel_size
    assert {one.adapters for one in found} == {
        MODEL.num_layers // stages * adapter_parameters(MODEL, LORA, tensor)
    }
    assert bool(found[0].others) and (stages == 1 or not found[-1].others)
    if tensor == 1:  # the front end counts as if every rank had it whole
        assert expected.gradients == max(one.gradients for one in found)
        assert expected.optimizer == max(one.moments for one in found)


def test_parameters_by_hand() -> None:
    """Width 8, two of four heads' keys, inner width 12, rank 3: 3 ((8+8) + 2 (8+4) + (8+8) + 2 (8+12) + (12+8))."""
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2
    )
    assert adapter_parameters(model, LORA) == 3 * (16 + 24 + 16 + 40 + 20)
    # Two ranks: half of what is split with the matrix: outputs, or in o_proj and down_proj inputs.
    assert adapter_parameters(model, LORA, 2) == 3 * ((8 + 4) + 2 * (8 + 2) + (4 + 8) + 2 * (8 + 6) + (6 + 8))
    assert adapter_parameters(model, replace(LORA, lora_rank=None)) == 0


def test_flops_by_hand() -> None:
    """13 tokens through 2 layers: 2 FLOPs for each of the adapters' weights, three times; the decoder is frozen."""
    model = ModelConfig(
        num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2
    )
    assert adapter_flops(model, LORA, WORK) == 3 * 13 * 2 * 2 * 3 * (16 + 24 + 16 + 40 + 20)
    adapted = lora_config()
    bare = replace(adapted, lora=replace(LORA, lora_rank=None))
    with_adapters, without = (model_flops(config, WORK) for config in (adapted, bare))
    assert "adapters" not in without
    assert with_adapters["adapters"] == adapter_flops(MODEL, LORA, WORK)
    for part in ("decoder", "output_layer"):
        assert with_adapters[part] * 3 == without[part] * 2
    others = set(without) - {"decoder", "output_layer"}
    assert {name: with_adapters[name] for name in others} == {name: without[name] for name in others}
    assert set(find_family(adapted.family).stages)
