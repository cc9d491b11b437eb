"""The aligning layer under every layout: losses and all gradients equal to the single device, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Any

import pytest
import torch

from megatron_eve.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_eve.models.eve.config import EVEConfig
from tests.golden_dir import find_golden
from tests.layouts import (
    CP2,
    CP2_DP2,
    CP4,
    DP2,
    ONE,
    PP2,
    PP2_VPP2,
    PP2_VPP2_CP2,
    PP4,
    PP4_UNEVEN,
    PP4_VPP2,
    TP2,
    TP2_CP2,
    TP2_PP2,
    TP2_SP,
    TP2_SP_CP2,
    Layout,
    parametrize,
)
from tests.ranks import RankPool

pytestmark = pytest.mark.distributed

TEACHER = "_shared/openai/clip-mini-patch14-112"


@dataclass(frozen=True)
class Content:
    """What the step holds.

    Attributes:
        image_size: 224, or 448 with 2 x 2 pooling.
        first, count: samples of the case: 0, 2 and 3 have an image, 1 has none.
    """

    image_size: int = 224
    first: int = 0
    count: int = 4


def run_config(parallel: ParallelConfig, content: Content, **training: Any) -> RunConfig:
    from megatron_eve.verification.cases import read_model_case

    case = read_model_case(find_golden("mini224_mixed"))
    return RunConfig(
        model=case.model,
        vision=replace(
            case.vision,
            image_size=content.image_size,
            patch_aligning=True,
            teacher_model=str(find_golden(TEACHER)),
        ),
        parallel=replace(parallel, use_distributed_optimizer=False),
        training=TrainingConfig(
            stage=training.pop("stage", 2),
            global_batch_size=content.count,
            train_iters=1,
            transformer_impl="local",
            **training,
        ),
        # Two packs for four samples; a third of them without an image.
        data=DataConfig(
            mock_data=True,
            shuffle=False,
            seq_length=320 if content.image_size == 224 else 512,
            image_decoder="pillow",  # bit-equal to what the reference sees
        ),
    )


@dataclass
class Outcome:
    """Losses and whole gradients by Hugging Face name."""

    losses: dict[str, float]
    gradients: dict[str, torch.Tensor]


def one_step(config: RunConfig, first: int, unmarked: str | None = None) -> Outcome | None:
    """Runs on each rank: one step in float64.

    Args:
        config: of the run.
        first: consumed samples.
        unmarked: glob of parameters that lose their mark `sequence_parallel`.
    """
    from megatron.core import parallel_state

    from megatron_eve.checkpoint.hf import load
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.eve.hf import format as eve_format
    from megatron_eve.models.eve.teacher import Teacher, TeacherTargets
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.data import build_loader, data_in_memory
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.step import forward_backward
    from megatron_eve.training.loop.wrap import wrap_for_training
    from megatron_eve.verification.case_run import CaseDataset
    from megatron_eve.verification.cases import read_model_case
    from megatron_eve.verification.model_cases import whole_gradients

    case = replace(read_model_case(find_golden("mini224_mixed")), model=config.model, vision=config.vision)
    with model_parallel(config):
        bare = build_chunks(config)
        # Weights are wanted, the same under every layout, also for features at depths that nobody published.
        interval = config.vision.tap_interval
        published, eve_format.PUBLISHED_TAP_INTERVAL = eve_format.PUBLISHED_TAP_INTERVAL, interval
        load.load_hf_weights(case.hf, bare, case)
        eve_format.PUBLISHED_TAP_INTERVAL = published
        for chunk in bare:
            chunk.double()
            chunk.config.params_dtype = chunk.config.pipeline_dtype = torch.float64
            for name, parameter in chunk.global_named_parameters():
                if unmarked and fnmatch(name, unmarked):
                    del parameter.sequence_parallel
        chunks = wrap_for_training(config, bare)
        models = {}
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            teacher = Teacher(config.vision, dtype=torch.float64, device=torch.device("cpu"))
            models = {"align loss": TeacherTargets(teacher)}
        loader = build_loader(config, data_in_memory(config, CaseDataset(case)))
        step = loader.step(first)
        for wrapped in chunks:
            wrapped.zero_grad_buffer()
        normalizer = Normalizer.of(step, objectives_of(config))
        losses = forward_backward(chunks, step, normalizer, models)
        loader.close()
        gradients = whole_gradients(bare, case)
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return Outcome({name: float(loss) for name, loss in losses.items()}, gradients) if last else None


@pytest.fixture(scope="module")
def single_device(ranks: RankPool) -> Any:
    return cache(lambda content: ranks.run(1, one_step, run_config(ONE.parallel, content), content.first)[-1])


def worst_gradient(found: Outcome, expected: Outcome) -> tuple[float, str]:
    """Largest relative L2 distance of a gradient, and whose it is."""
    assert set(found.gradients) == set(expected.gradients)
    errors = []
    for name, golden in expected.gradients.items():
        scale = golden.norm().item()
        error = (found.gradients[name] - golden).norm().item()
        errors.append((error / scale if scale > 1e-12 else error, name))
    return max(errors)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@parametrize(
    ONE, TP2, TP2_SP, PP2, PP4, PP4_UNEVEN, PP2_VPP2, CP2, TP2_PP2, TP2_SP_CP2, PP2_VPP2_CP2, CP2_DP2,
    slow=(DP2, TP2_CP2, CP4, PP4_VPP2),  # their parts are all among the others
)  # fmt: skip
@pytest.mark.parametrize(
    ("recompute", "text_only"),
    [({}, False), (FULL, False), ({}, True), pytest.param(FULL, True, marks=pytest.mark.slow)],
    ids=["kept-images", "recomputed-images", "kept-text", "recomputed-text"],
)
@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
def test_the_layout_changes_nothing(
    ranks: RankPool,
    single_device: Any,
    layout: Layout,
    recompute: dict[str, Any],
    image_size: int,
    text_only: bool,
) -> None:
    content = Content(image_size, first=1, count=1) if text_only else Content(image_size)
    expected = single_device(content)
    assert (expected.losses["align loss"] == 0) == text_only
    found = ranks.run(
        layout.world_size, one_step, run_config(layout.parallel, content, **recompute), content.first
    )[-1]
    for name, loss in expected.losses.items():
        assert found.losses[name] == pytest.approx(loss, abs=5e-6)  # the cross entropy is float32
    error, name = worst_gradient(found, expected)
    assert error < 1e-6, name


def one_fixed_step(config: RunConfig, first: int) -> Outcome | None:
    """Runs on each rank: `one_step`, in which no stage may tell another a shape."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    original = P2PCommunicator._communicate_shapes

    def refused(*_: Any) -> Any:
        raise AssertionError("stages exchange shapes")

    P2PCommunicator._communicate_shapes = refused  # type: ignore[method-assign]
    try:
        return one_step(config, first)
    finally:
        P2PCommunicator._communicate_shapes = original  # type: ignore[method-assign]


@parametrize(
    PP4_UNEVEN,
    PP2_VPP2_CP2,
    slow=(ONE, TP2_SP, PP2, PP4, PP4_VPP2, CP2, CP2_DP2, TP2_SP_CP2, TP2_PP2),
)
@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
@pytest.mark.parametrize(
    "text_only", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["images", "text"]
)
def test_fixed_shapes_change_nothing(
    ranks: RankPool, single_device: Any, layout: Layout, image_size: int, text_only: bool
) -> None:
    """All packs padded to one length, streams to room for features of all rows: losses and gradients as without."""
    content = Content(image_size, first=1, count=1) if text_only else Content(image_size)
    config = run_config(replace(layout.parallel, variable_seq_lengths=False), content)
    found = ranks.run(layout.world_size, one_fixed_step, config, content.first)[-1]
    assert found.losses == pytest.approx(single_device(content).losses, abs=5e-6)
    error, name = worst_gradient(found, single_device(content))
    assert error < 1e-6, name


def test_stages_of_differing_packs_do_exchange_shapes(ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="stages exchange shapes"):
        ranks.run(2, one_fixed_step, run_config(PP2.parallel, Content()), 0)


@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
@pytest.mark.parametrize("unmarked", ["input_tap.*", "decoder.layers.*.tap.*", "aligning_layer.*"])
def test_a_missing_mark_is_noticed(
    ranks: RankPool, single_device: Any, image_size: int, unmarked: str
) -> None:
    """Without `sequence_parallel` on a projection's weights their gradient is short, and the matrix must see it."""
    content = Content(image_size)
    found = ranks.run(2, one_step, run_config(TP2_SP.parallel, content), 0, unmarked)[-1]
    error, name = worst_gradient(found, single_device(content))
    assert error > 0.1 and "vision_tower_compressor" in name


@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
def test_a_rank_without_an_image(ranks: RankPool, single_device: Any, image_size: int) -> None:
    """Two data-parallel ranks, one of which has no image, with reductions that start while gradients come in."""
    content = Content(image_size, first=1, count=2)
    config = run_config(replace(DP2.parallel, overlap_grad_reduce=True), content)
    found = ranks.run(2, one_step, config, content.first)[-1]
    error, name = worst_gradient(found, single_device(content))
    assert error < 1e-6, name
    assert found.losses == pytest.approx(single_device(content).losses, abs=5e-6)


def test_depths_that_do_not_divide_evenly(ranks: RankPool) -> None:
    """An interval of 3 in 8 layers: features at 8, 5 and 2, none at the input; of four chunks the first has none."""
    content = Content()

    def uneven(layout: Layout) -> RunConfig:
        config = run_config(layout.parallel, content)
        return replace(config, vision=replace(config.vision, tap_interval=3))

    expected = ranks.run(1, one_step, uneven(ONE), 0)[-1]
    for layout in (PP4_VPP2, TP2_SP_CP2):
        found = ranks.run(layout.world_size, one_step, uneven(layout), 0)[-1]
        error, name = worst_gradient(found, expected)
        assert error < 1e-6, name
        assert found.losses == pytest.approx(expected.losses, abs=5e-6)


def boundaries(config: RunConfig) -> list[tuple[int, int, int]]:
    """Runs on each rank: (rows that arrive, hidden rows among them, rows of features) of each pack and chunk."""
    from megatron_eve.models.decoder.model import VisionLanguageModel

    seen = []
    original = VisionLanguageModel._open_features

    def watched(self: Any, hidden: torch.Tensor, inputs: Any, width: int) -> Any:
        if not self.pre_process:
            seen.append(
                (len(hidden), inputs.packed.feature_rows.hidden_rows, inputs.packed.feature_rows.count)
            )
        return original(self, hidden, inputs, width)

    VisionLanguageModel._open_features = watched  # type: ignore[method-assign]
    try:
        one_step(config, 0)
    finally:
        VisionLanguageModel._open_features = original  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
def test_a_boundary_carries_what_the_features_hold_and_no_more(ranks: RankPool, image_size: int) -> None:
    """Eight layers in four stages, features of depths 0 and 4: one behind layer 2, two behind layers 4 and 6."""
    content = Content(image_size)
    found = ranks.run(4, boundaries, run_config(PP4.parallel, content))
    assert found[0] == [] and found[1]
    rows = 64 + 48 + 40  # teacher patches, whatever the resolution
    for depths, seen in zip((1, 2, 2), found[1:], strict=True):
        assert sum(count for _, _, count in seen) == rows
        for arrived, hidden, count in seen:
            assert arrived - hidden == -(-depths * count * 48 // 64)


def who_works(config: RunConfig) -> list[str]:
    """Runs on each rank: what the rank did in a step, in order."""
    from megatron_eve.models.decoder.model import VisionLanguageModel
    from megatron_eve.models.eve.teacher import Teacher

    events = []
    forward, call = VisionLanguageModel.forward, Teacher.__call__

    def watched_forward(self: Any, inputs: Any) -> Any:
        events.append("model")
        return forward(self, inputs)

    def watched_call(self: Any, images: torch.Tensor) -> torch.Tensor:
        if not (images == 127).all():  # the grey picture that it tries before the first step
            events.append("teacher")
        return call(self, images)

    VisionLanguageModel.forward, Teacher.__call__ = watched_forward, watched_call  # type: ignore[method-assign]
    try:
        one_step(config, 0)
    finally:
        VisionLanguageModel.forward, Teacher.__call__ = forward, call  # type: ignore[method-assign]
    return events


def test_the_teacher_uses_the_time_in_which_the_last_stage_waits(ranks: RankPool) -> None:
    """The first two packs' pictures are seen before any pack comes through the pipeline; none is seen twice."""
    (alone,) = ranks.run(1, who_works, run_config(ONE.parallel, Content()))
    *others, last = ranks.run(4, who_works, run_config(PP4.parallel, Content()))
    assert alone.count("teacher") == 3 and alone.count("model") == 4  # one sample has no picture
    second = [i for i, event in enumerate(alone) if event == "model"][1] + 1
    early = [event for event in alone[:second] if event == "teacher"]
    assert early and last == early + ["model"] * 2 + alone[second:]
    assert others == [["model"] * 4] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with TransformerEngine")
@pytest.mark.parametrize("image_size", [224, 448], ids=["patches", "pooled"])
def test_transformer_engine_aligns_as_torch_does(image_size: int) -> None:
    """One pack in bfloat16 through both layer specifications from the same weights, full recomputation included."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import distributed
    from megatron_eve.runtime.accelerator import accelerator
    from megatron_eve.training.loop.data import build_loader, open_data
    from megatron_eve.training.loop.microbatch import DevicePack, model_inputs
    from megatron_eve.training.loop.targets import build_target_models

    accelerator()
    teacher = find_golden(TEACHER)
    found = {}
    for choice in ("local", "transformer_engine"):
        config = RunConfig(
            model=ModelConfig(hidden_size=256, ffn_hidden_size=704),
            # Bare modules have no buffer to which a matrix product could add a gradient.
            training=TrainingConfig(
                train_iters=1,
                bf16=True,
                transformer_impl=choice,  # type: ignore[arg-type]
                gradient_accumulation_fusion=False,
                **FULL,
            ),
            vision=EVEConfig(image_size=image_size, patch_aligning=True, teacher_model=str(teacher)),
            data=DataConfig(mock_data=True, seq_length=1024),
        )
        with distributed(config):
            torch.manual_seed(0)
            (chunk,) = build_chunks(config)
            chunk.bfloat16()
            loader = build_loader(config, open_data(config))
            pack = DevicePack(loader.step(0).batches[0])
            losses = chunk(model_inputs(pack, chunk, build_target_models(config)))
            (losses["lm loss"].mean() + losses["align loss"]).backward()
            loader.close()
            projections = {name: p.grad.float() for name, p in chunk.named_parameters() if ".tap." in name}
            found[choice] = (losses["lm loss"].detach(), losses["align loss"].detach(), projections)
    for ours, theirs in zip(found["local"][:2], found["transformer_engine"][:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    for name, gradient in found["local"][2].items():
        other = found["transformer_engine"][2][name]
        assert (gradient - other).norm() < 0.1 * gradient.norm(), name
