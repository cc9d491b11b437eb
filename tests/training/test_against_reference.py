"""Training against the plain single-device reference: losses, gradients, and six AdamW steps of every stage."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_eve.config import OptimizerConfig, ParallelConfig, RunConfig
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2_VPP2_CP2, TP2_PP2, TP2_SP_CP2, Layout, parametrize
from tests.ranks import RankPool
from tests.reference_eve import ReferenceEVE, ReferenceSample
from tests.training.test_aligning import TEACHER, Content, one_step, run_config

pytestmark = pytest.mark.distributed

STEPS = 6


def reference(content: Content, dtype: torch.dtype) -> tuple[ReferenceEVE, list[ReferenceSample]]:
    """The published weights and the samples of a content."""
    from megatron_eve.verification.cases import read_model_case

    case = read_model_case(find_golden("mini224_mixed"))
    model = ReferenceEVE(
        case.hf.resolve(), find_golden(TEACHER), image_size=content.image_size, teacher_size=112, dtype=dtype
    )
    samples = []
    for i in range(content.first, content.first + content.count):
        real, files = case.inputs["attention_mask"][i], case.images[i]
        ids, labels = case.inputs["input_ids"][i][real].tolist(), case.inputs["labels"][i][real].tolist()
        samples.append(ReferenceSample(ids, labels, Image.open(io.BytesIO(files[0])) if files else None))
    return model, samples


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "content", [Content(), Content(448), Content(224, 1, 1), Content(448, 1, 2)], ids=str
)
def test_losses_and_gradients(ranks: RankPool, content: Content, stage: int) -> None:
    found = ranks.run(1, one_step, run_config(ONE.parallel, content, stage=stage), content.first)[-1]
    model, samples = reference(content, torch.float64)
    model.freeze_for(stage)
    result = model.forward(samples)
    total = result.language_loss + result.align_loss
    if total.requires_grad:
        total.backward()
    assert found.losses["lm loss"] == pytest.approx(result.language_loss.item(), abs=5e-6)
    assert found.losses["align loss"] == pytest.approx(result.align_loss.item(), abs=1e-6)
    expected = {name: p.grad for name, p in model.parameters.items() if p.grad is not None}
    trained = {name for name, p in model.parameters.items() if p.requires_grad}
    assert set(found.gradients) == trained
    for name, gradient in found.gradients.items():
        if name in expected:
            # Our rotary angles and the reference's differ in their last float32 digits.
            distance = (gradient - expected[name]).norm() / max(float(expected[name].norm()), 1e-8)
            assert distance < 2e-5, name
        else:
            assert not gradient.any(), name  # no image in the batch: nothing of the vision side is moved


@dataclass
class Steps:
    """Losses of every step, and the weights behind the last, by Hugging Face name (last rank)."""

    language: list[float]
    aligning: list[float]


def six_steps(config: RunConfig) -> Steps:
    """Runs on each rank: six optimizer steps on the case, in float32, from the published weights."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.data import build_loader, data_in_memory
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.optimizer import build_optimizer, build_scheduler
    from megatron_eve.training.loop.step import train_step
    from megatron_eve.training.loop.targets import build_target_models
    from megatron_eve.training.loop.wrap import wrap_for_training
    from megatron_eve.verification.case_run import CaseDataset
    from megatron_eve.verification.cases import read_model_case

    case = replace(read_model_case(find_golden("mini224_mixed")), model=config.model, vision=config.vision)
    with model_parallel(config):
        bare = build_chunks(config)
        load_hf_weights(case.hf, bare, case)
        chunks = wrap_for_training(config, bare)
        optimizer = build_optimizer(config, chunks)
        scheduler = build_scheduler(config, optimizer)
        scheduler.step(increment=0)
        models = build_target_models(config)
        loader = build_loader(config, data_in_memory(config, CaseDataset(case)))
        step = loader.step(0)
        normalizer = Normalizer.of(step, objectives_of(config))
        taken = Steps([], [])
        for _ in range(STEPS):
            losses = train_step(chunks, optimizer, step, normalizer, models).losses
            scheduler.step(increment=config.training.global_batch_size)
            taken.language.append(float(losses["lm loss"]))
            taken.aligning.append(float(losses["align loss"]))
        loader.close()
    return taken


@pytest.fixture(scope="module")
def plain_steps() -> Any:
    """Steps of the reference with torch's own AdamW and cosine schedule, by (stage, rate, content)."""
    known: dict[Any, Steps] = {}

    def steps(stage: int, rate: float, content: Content) -> Steps:
        if (stage, rate, content) not in known:
            model, samples = reference(content, torch.float32)
            model.freeze_for(stage)
            trained = [p for p in model.parameters.values() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
            taken = Steps([], [])
            for _ in range(STEPS):
                result = model.forward(samples)
                optimizer.zero_grad()
                (result.language_loss + result.align_loss).backward()
                optimizer.step()
                schedule.step()
                taken.language.append(result.language_loss.item())
                taken.aligning.append(result.align_loss.item())
            known[stage, rate, content] = taken
        return known[stage, rate, content]

    return steps


@parametrize(ONE, PP2_VPP2_CP2, slow=(TP2_PP2,))
@pytest.mark.parametrize(
    ("stage", "rate", "image_size"),
    [(1, 4e-4, 224), (2, 4e-5, 224), (3, 2e-5, 448)],
    ids=["1", "2", "3-pooled"],
)
def test_six_steps_of_each_stage(
    ranks: RankPool, plain_steps: Any, layout: Layout, stage: int, rate: float, image_size: int
) -> None:
    content = Content(image_size)
    config = run_config(layout.parallel, content, stage=stage)
    config = replace(
        config,
        training=replace(config.training, train_iters=STEPS),
        optimizer=OptimizerConfig(lr=rate, lr_warmup_fraction=0.0),
        parallel=layout.parallel,
    )
    taken = ranks.run(layout.world_size, six_steps, config)[-1]
    expected = plain_steps(stage, rate, content)
    assert taken.language == pytest.approx(expected.language, abs=2e-5)
    assert taken.aligning == pytest.approx(expected.aligning, abs=2e-5)
    assert (
        expected.aligning[-1] < expected.aligning[0] - 100 * 2e-5
    )  # it moves much farther than the tolerance


def published_hd(parallel: ParallelConfig) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Runs on each rank: losses and whole gradients of the published case's pictures at 1344 pixels, in float32."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.data import build_loader, data_in_memory
    from megatron_eve.training.loop.loss import Normalizer, objectives_of
    from megatron_eve.training.loop.step import forward_backward
    from megatron_eve.training.loop.targets import build_target_models
    from megatron_eve.training.loop.wrap import wrap_for_training
    from megatron_eve.verification.case_run import CaseDataset, case_config
    from megatron_eve.verification.cases import read_model_case
    from megatron_eve.verification.model_cases import whole_gradients

    case = read_model_case(find_golden("eve672_square_wide_tall"))
    case = replace(case, vision=replace(case.vision, image_size=1344))
    config = case_config(case, parallel, recompute=True)
    with model_parallel(config):
        bare = build_chunks(config)
        load_hf_weights(case.hf, bare, case)
        chunks = wrap_for_training(config, bare)
        loader = build_loader(config, data_in_memory(config, CaseDataset(case)))
        step = loader.step(0)
        normalizer = Normalizer.of(step, objectives_of(config))
        losses = forward_backward(chunks, step, normalizer, build_target_models(config))
        loader.close()
        return {name: float(loss) for name, loss in losses.items()}, whole_gradients(bare, case)


@pytest.mark.slow
@parametrize(ONE, TP2_SP_CP2)
def test_1344_pixels(ranks: RankPool, layout: Layout) -> None:
    """The HD model's own sizes: 2,353 rows for a square picture, a 336-pixel teacher, 2 x 2 pooling."""
    from megatron_eve.verification.cases import read_model_case

    case = read_model_case(find_golden("eve672_square_wide_tall"))
    losses, gradients = ranks.run(layout.world_size, published_hd, layout.parallel)[0]
    model = ReferenceEVE(
        case.hf.resolve(), Path(case.vision.teacher_model), image_size=1344, teacher_size=336
    )
    samples = []
    for ids, labels, real, files in zip(
        case.inputs["input_ids"],
        case.inputs["labels"],
        case.inputs["attention_mask"],
        case.images,
        strict=True,
    ):
        picture = Image.open(io.BytesIO(files[0])) if files else None
        samples.append(ReferenceSample(ids[real].tolist(), labels[real].tolist(), picture))
    result = model.forward(samples)
    (result.language_loss + result.align_loss).backward()
    assert losses["lm loss"] == pytest.approx(result.language_loss.item(), abs=1e-5)
    assert losses["align loss"] == pytest.approx(result.align_loss.item(), abs=1e-5)
    assert set(gradients) == set(model.parameters)
    for name, parameter in model.parameters.items():
        assert parameter.grad is not None
        distance = (gradients[name] - parameter.grad).norm() / max(float(parameter.grad.norm()), 1e-4)
        assert distance < 5e-5, name
