"""The front end against published features, and under parallel layouts against one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.models.vila.config import VILAConfig
from tests.golden_dir import find_golden
from tests.layouts import CP2, DP2, ONE, TP2, TP2_CP2, TP2_SP, TP2_SP_CP2, Layout, parametrize
from tests.models.vila.golden_front_end import (
    CLIP,
    SIGLIP,
    difference,
    front_end_weights,
    pictures,
    put,
    run_config,
)
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

DECODER = 48


def published_features(case: Path, vision: VILAConfig, batches: tuple[str, ...]) -> dict[str, float]:
    """Runs on a rank: differences of features and rows from the published ones."""
    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.model_parts import VisualInputs
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila.front_end import TowerFrontEnd

    config = run_config(DECODER)
    inputs, outputs = (load_file(case / f"{name}.safetensors") for name in ("inputs", "outputs"))
    found = {}
    with model_parallel(config), torch.no_grad():
        front_end = TowerFrontEnd(transformer_config(config), vision)
        put(front_end, front_end_weights(case))
        for batch in batches:
            bytes_ = pictures(inputs[f"batch.{batch}.images"], vision.vision_model_type)
            grids = torch.full((len(bytes_), 2), vision.grid)
            features = front_end.tower(bytes_)
            rows = front_end(VisualInputs({"tower": bytes_}, grids))
            expected = outputs[f"{batch}.image_features"]
            found[f"{batch} features"] = difference(features, outputs[f"{batch}.vision_features"])
            found[f"{batch} rows"] = difference(rows, expected.flatten(0, 1))
    return found


@pytest.mark.parametrize(
    ("case", "vision", "batches"),
    [
        ("vila10_llm", CLIP, ("pretrain", "sft", "align")),
        ("vila15_llm", SIGLIP, ("mixed", "no_padding")),
    ],
)
def test_features_are_the_published_ones(
    ranks: RankPool, case: str, vision: VILAConfig, batches: tuple[str, ...]
) -> None:
    (found,) = ranks.run(1, published_features, find_golden(f"vila/{case}"), vision, batches)
    assert max(found.values()) < 5e-6, found


class Step(NamedTuple):
    """What a rank has after a step.

    Attributes:
        gradients: of what trains, by name, and the dimension that is spread over the tensor-parallel ranks.
        counts: pictures through the tower, by call.
        rank: tensor-parallel.
    """

    gradients: dict[str, tuple[torch.Tensor, int | None]]
    counts: list[int]
    rank: int


def train_steps(
    layout: Layout, vision: VILAConfig, steps: tuple[tuple[int, ...], ...], marked: bool = True, **ddp: Any
) -> list[Step]:
    """Runs on each rank: steps of packs with so many pictures each; ranks that differ in data have others."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    from megatron_eve.models.build import transformer_config
    from megatron_eve.models.model_parts import ImageShare, VisualInputs
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.models.vila.front_end import TowerFrontEnd

    config = run_config(DECODER, layout)
    done = []
    with model_parallel(config):
        transformer = transformer_config(config)
        bare = TowerFrontEnd(transformer, vision)
        if vision.freeze_ViT:
            bare.tower.requires_grad_(False)
        for parameter in bare.tower.parameters():
            assert parameter.average_gradients_across_tp_domain
            parameter.average_gradients_across_tp_domain = marked
        counts: list[int] = []
        bare.tower.embeddings.register_forward_hook(lambda _, __, output: counts.append(len(output)))
        model = DistributedDataParallel(transformer, DistributedDataParallelConfig(**ddp), bare)
        share = ImageShare(
            parallel_state.get_tensor_and_context_parallel_rank(),
            parallel_state.get_tensor_and_context_parallel_world_size(),
        )
        context, parts = (
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
        )
        data = parallel_state.get_data_parallel_rank()
        for packs in steps:
            model.zero_grad_buffer()
            for number, images in enumerate(packs):
                with model.no_sync() if number + 1 < len(packs) else torch.enable_grad():
                    images_here = images if data == 0 else 0
                    drawn = torch.manual_seed(7 + number)
                    every = torch.randint(
                        0, 256, (images_here, 28, 28, 3), dtype=torch.uint8, generator=drawn
                    )
                    own = share.images(images_here)
                    grids = torch.full((images_here, 2), 4)
                    rows = model(VisualInputs({"tower": every[own.start : own.stop]}, grids))
                    targets = torch.randn(len(rows), DECODER, generator=drawn)
                    rows = rows.view(parts, -1, 1, DECODER)[context] if len(rows) else rows[:, None]
                    targets = targets.view(parts, -1, 1, DECODER)[context] if len(rows) else targets[:, None]
                    if transformer.sequence_parallel:
                        rows, targets = (scatter_to_sequence_parallel_region(x) for x in (rows, targets))
                    (((rows - targets) ** 2).sum() * parts).backward()  # as the schedule does
            finalize_model_grads([model], None)
            gradients = {}
            for name, parameter in bare.named_parameters():
                if parameter.requires_grad:
                    spread = getattr(parameter, "tensor_model_parallel", False)
                    dim = parameter.partition_dim if spread else None
                    gradients[name] = parameter.main_grad.clone(), dim
                else:
                    assert not hasattr(parameter, "main_grad")
            done.append(Step(gradients, counts[:], parallel_state.get_tensor_model_parallel_rank()))
            counts.clear()
    return done


def merged(steps: list[Step], size: int) -> dict[str, torch.Tensor]:
    """Whole gradients of a step from those of the ranks; what is not spread is the same on all."""
    first = {step.rank: step for step in reversed(steps)}
    whole = {}
    for name, (gradient, dim) in steps[0].gradients.items():
        if dim is None:
            assert all(torch.equal(gradient, step.gradients[name][0]) for step in steps), name
            whole[name] = gradient
        else:
            whole[name] = torch.cat([first[rank].gradients[name][0] for rank in range(size)], dim)
    return whole


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(expected)
    assert all(gradient.any() for gradient in expected.values())
    # Key biases have no gradient but rounding noise.
    names = [name for name in expected if not name.endswith("k_proj.bias")]
    return max(difference(found[name], expected[name]) for name in names)


TRAINED = VILAConfig(freeze_ViT=False)  # 28 pixels, 4 x 4 features, 3 layers of which 2 are run
STEPS = ((5,), (0,), (1, 4), (4, 0))


@pytest.fixture(scope="module")
def one_process(ranks: RankPool) -> list[Step]:
    return ranks.run(1, train_steps, ONE, TRAINED, STEPS)[0]


@parametrize(TP2, TP2_SP, CP2, TP2_SP_CP2, slow=(TP2_CP2,))
def test_gradients_are_those_of_one_process(ranks: RankPool, one_process: list[Step], layout: Layout) -> None:
    """A pack with fewer pictures than ranks, one without, and steps of several packs; each rank runs its share."""
    tensor = layout.parallel.tensor_model_parallel_size
    sharing = tensor * layout.parallel.context_parallel_size
    found = ranks.run(layout.world_size, train_steps, layout, TRAINED, STEPS)
    for number, packs in enumerate(STEPS):
        steps = [of_rank[number] for of_rank in found]
        gradients, expected = merged(steps, tensor), merged([one_process[number]], 1)
        if any(packs):
            assert worst(gradients, expected) < 5e-5
        else:
            assert not any(gradient.any() for gradient in gradients.values())
        for step in steps:  # a rank without a picture runs a black one
            assert all(
                count <= max(math.ceil(images / sharing), 1)
                for count, images in zip(step.counts, packs, strict=True)
            )
        assert max(step.counts[0] for step in steps) == max(math.ceil(packs[0] / sharing), 1)


def test_without_the_mark_gradients_are_wrong(ranks: RankPool, one_process: list[Step]) -> None:
    found = ranks.run(2, train_steps, TP2, TRAINED, STEPS[:1], False)
    tower = {name: value for name, value in merged([one_process[0]], 1).items() if name.startswith("tower.")}
    gradients = {name: found[0][0].gradients[name][0] for name in tower}
    assert worst(gradients, tower) > 0.1


def test_overlapped_reduction(ranks: RankPool, one_process: list[Step]) -> None:
    """Two data-parallel ranks, of which the second has no picture; a step of text alone between others."""
    found = ranks.run(2, train_steps_with, DP2, TRAINED, STEPS, {"overlap_grad_reduce": True})
    for number, packs in enumerate(STEPS):
        for of_rank in found:
            gradients = {name: 2 * value for name, (value, _) in of_rank[number].gradients.items()}
            if any(packs):
                assert worst(gradients, merged([one_process[number]], 1)) < 5e-5
            else:
                assert not any(gradient.any() for gradient in gradients.values())


def train_steps_with(
    layout: Layout, vision: VILAConfig, steps: tuple[tuple[int, ...], ...], options: dict[str, Any]
) -> list[Step]:
    """`train_steps`, which takes options by name."""
    return train_steps(layout, vision, steps, **options)


def test_a_frozen_tower(ranks: RankPool, one_process: list[Step]) -> None:
    """No gradient buffer (`train_steps` looks), the projector's gradients as before, no picture more."""
    expected = {
        name: value for name, value in merged([one_process[0]], 1).items() if name.startswith("projector.")
    }
    found = [of_rank[0] for of_rank in ranks.run(2, train_steps, TP2_SP, VILAConfig(), ((3,),))]
    assert set(merged(found, 2)) == set(expected)
    assert [step.counts for step in found] == [[2], [1]]
    found = [of_rank[0] for of_rank in ranks.run(2, train_steps, TP2, VILAConfig(), ((1, 0),))]
    assert [step.counts for step in found] == [[1], []]
