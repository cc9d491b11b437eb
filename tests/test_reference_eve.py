"""The plain reference against the golden tensors of the published model, before others are held against it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.golden_dir import find_golden
from tests.reference_eve import IMAGE_TOKEN, ReferenceEVE, ReferenceSample, Tensor

CASES = ["mini224_mixed", "eve672_square_wide_tall"]


def weights_of(case: Path) -> tuple[Path, Path]:
    """The model's folder and the teacher's; the `hf` of a copied case may be a file that names its target."""
    link = case / "hf"
    hf = link.resolve() if link.is_dir() else (case / link.read_text(encoding="utf-8").strip()).resolve()
    if not hf.is_dir():
        pytest.skip(f"the weights {hf} of {case.name} are not there")
    teacher = json.loads((hf / "config.json").read_text(encoding="utf-8"))["mm_vision_tower_clip"]
    return hf, hf.parent / teacher


def build(case: Path, image_size: int | None = None, dtype: torch.dtype = torch.float32) -> ReferenceEVE:
    meta = json.loads((case / "meta.json").read_text(encoding="utf-8"))
    hf, teacher = weights_of(case)
    size = image_size or meta["image_size"]
    return ReferenceEVE(hf, teacher, image_size=size, teacher_size=meta["image_size_clip"], dtype=dtype)


def samples_of(case: Path) -> list[ReferenceSample]:
    inputs = load_file(case / "inputs.safetensors")
    samples = []
    for i, mask in enumerate(inputs["attention_mask"].bool()):
        ids = inputs["input_ids"][i][mask].tolist()
        image = None
        if IMAGE_TOKEN in ids:
            (path,) = (case / "raw").glob(f"{i}_*.png")
            image = Image.open(path)
        samples.append(ReferenceSample(ids, inputs["labels"][i][mask].tolist(), image))
    return samples


def distance(found: Tensor | None, wanted: Tensor) -> float:
    """Relative L2."""
    assert found is not None and found.shape == wanted.shape
    return float((found.detach().double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_published_model(name: str) -> None:
    case = find_golden(name)
    golden = load_file(case / "outputs.safetensors")
    samples, model = samples_of(case), build(case)
    result = model.forward(samples)
    (result.language_loss + 1.0 * result.align_loss).backward()

    assert result.language_loss.item() == pytest.approx(golden["llm_loss"].item(), abs=1e-5)
    assert result.align_loss.item() == pytest.approx(golden["clip_loss"].item(), abs=1e-5)
    errors = {}
    for i, sample in enumerate(samples):
        loss = result.align_losses[i]
        if sample.image is None:
            assert loss is result.predictions[i] is result.targets[i] is None
            continue
        assert loss is not None
        assert loss.item() == pytest.approx(golden["clip_loss_per_sample"][i].item(), abs=1e-5)
        errors[f"pal_pred.{i}"] = distance(result.predictions[i], golden[f"pal_pred.{i}"])
        errors[f"pal_teacher.{i}"] = distance(result.targets[i], golden[f"pal_teacher.{i}"])
    assert {key: error for key, error in errors.items() if error > 5e-6} == {}

    grads = {key: wanted for key, wanted in golden.items() if key.startswith("grad.")}
    errors = {key: distance(model.parameters[key[5:]].grad, wanted) for key, wanted in grads.items()}
    assert len(errors) == 43
    assert {key: error for key, error in errors.items() if error > 5e-5} == {}


def test_pooling_keeps_the_rows_of_the_teacher() -> None:
    case = find_golden("mini224_mixed")
    samples = samples_of(case)
    with torch.no_grad():
        once, twice = build(case).forward(samples), build(case, image_size=448).forward(samples)
    golden = load_file(case / "outputs.safetensors")
    for i, sample in enumerate(samples):
        if sample.image is not None:
            prediction, target = twice.predictions[i], twice.targets[i]
            assert prediction is not None and target is not None
            assert prediction.shape == target.shape == golden[f"pal_teacher.{i}"].shape
            assert distance(once.targets[i], target) == 0.0
    assert abs(twice.align_loss.item() - once.align_loss.item()) > 1e-3


def test_stage_1_trains_what_sees_the_image() -> None:
    case = find_golden("mini224_mixed")
    golden, model = load_file(case / "outputs.safetensors"), build(case)
    model.freeze_for(1)
    result = model.forward(samples_of(case))
    (result.language_loss + result.align_loss).backward()
    trained = {key for key, parameter in model.parameters.items() if parameter.grad is not None}
    assert len(trained) == 36
    assert all("vision_tower" in key or "mm_projector" in key for key in trained)
    errors = {key: distance(model.parameters[key].grad, golden[f"grad.{key}"]) for key in trained}
    assert {key: error for key, error in errors.items() if error > 5e-5} == {}
    model.freeze_for(2)
    assert all(parameter.requires_grad for parameter in model.parameters.values())


def test_nothing_of_float64_is_computed_in_float32() -> None:
    """A central difference along a random direction is the gradient to far below float32's precision."""
    case = find_golden("mini224_mixed")
    samples, model = samples_of(case)[:2], build(case, dtype=torch.float64)

    def loss() -> Tensor:
        result = model.forward(samples)
        return result.language_loss + result.align_loss

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    slope, step, moves = 0.0, 1e-7, []
    for parameter in model.parameters.values():
        move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        assert parameter.grad is not None
        slope += float((parameter.grad * move).sum())
        moves.append((parameter, step * move))
    ends = []
    with torch.no_grad():
        for times in (1, -2):
            for parameter, move in moves:
                parameter.add_(move, alpha=times)
            ends.append(loss().item())
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-7)


def test_text_alone_has_no_alignment_loss() -> None:
    case = find_golden("mini224_mixed")
    sample = next(sample for sample in samples_of(case) if sample.image is None)
    result = build(case).forward([sample])
    assert result.align_loss.item() == 0.0 and result.language_loss.item() > 0.0


def test_refuses_what_does_not_fit() -> None:
    case = find_golden("mini224_mixed")
    with pytest.raises(ValueError, match="even multiple"):
        build(case, image_size=112)
    picture = Image.new("RGB", (10, 20))
    with pytest.raises(ValueError, match="a sample with 0"):
        build(case).forward([ReferenceSample([1, 5], [-100, 5], picture)])
