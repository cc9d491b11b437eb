"""Golden cases of the losses that a tower is trained with. Imports no torch at its top."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eve.models.golden_format import Comparison, tensor_names

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.towers.discriminator import PatchDiscriminator
    from megatron_eve.models.towers.perceptual import PerceptualLoss

Tensors = Mapping[str, "torch.Tensor"]

_NEEDED = {"x", "z", "last.weight", "last.bias", "lpips.lin0", "disc.main.0.weight", "adaptive_weight"}
# Weight of the generator's loss and of the discriminator's in the public code.
_ADVERSARIAL = 0.75
# Made of gradients through the VGG-16, of which the public code's in float32 are up to 1.3e-5 away from float64.
_GRADIENTS = {"lpips_grad_y", "adaptive_weight", "total_without_commitment", "grad_last.weight"}
# The discriminator's, of which they are up to 9e-6 away: sums over all positions.
_OF_DISCRIMINATOR = "disc_grad."


def loss_files(folder: Path) -> list[Path]:
    """The files of a folder that are such cases."""
    return [path for path in sorted(folder.glob("*.safetensors")) if tensor_names(path) >= _NEEDED]


def loss_comparisons(name: str, case: Tensors) -> Iterator[Comparison]:
    """All values of a case, whose reconstruction is y = conv3x3(z), by its names.

    Their order is that of a step: the generator's pass, then the discriminator's of reconstruction and pictures; then
    one in evaluation. All is computed in float64: in float32 the order of a convolution's sums, and with it the side of
    0 on which an input of a ReLU falls, depends on the processor (gradients through the VGG-16 differ by up to 1e-2).
    """
    import torch

    from megatron_eve.runtime.accelerator import accelerator

    device = accelerator().device
    given = {
        key: tensor.to(device, torch.float64 if tensor.is_floating_point() else None)
        for key, tensor in case.items()
    }
    perceptual = perceptual_of(case).to(device, torch.float64)
    discriminator = discriminator_of(case).to(device, torch.float64)
    found = _tower_losses(given, perceptual, discriminator)
    found |= _discriminator_losses(given, found["y"].detach(), discriminator)
    with torch.no_grad():
        found["real_logits_eval"] = discriminator.eval()(given["x"])
    for key in sorted(case):
        if key in found:
            ours = found[key].detach()
            exact = not ours.is_floating_point()
            kind = (
                "exact"
                if exact
                else "gradient"
                if key in _GRADIENTS or key.startswith(_OF_DISCRIMINATOR)
                else "rounding"
            )
            yield Comparison(f"{name}.{key}", ours, case[key], kind)  # type: ignore[arg-type]


def perceptual_of(case: Tensors) -> PerceptualLoss:
    """The perceptual loss with the weights that the README of the case describes by a formula, and its five maps."""
    import torch

    from megatron_eve.models.towers.perceptual import PerceptualLoss

    loss = PerceptualLoss()
    weights = {}
    shapes = {name: shape for name, shape in loss.shapes().items() if name.startswith("features")}
    for number, name in enumerate(shapes):
        size = torch.Size(shapes[name]).numel()
        values = torch.arange(size, dtype=torch.float64) * (0.7548776662466927 + 0.001 * number)
        spread = 0.05 if name.endswith("bias") else (6 / torch.Size(shapes[name][1:]).numel()) ** 0.5
        weights[name] = ((values.frac() * 2 - 1).float() * spread).view(shapes[name])
    for level in range(5):
        weights[f"lin{level}.model.1.weight"] = case[f"lpips.lin{level}"]
    return loss.load(weights)


def discriminator_of(case: Tensors) -> PatchDiscriminator:
    """The discriminator of a case: its sizes are those of the tensors."""
    from megatron_eve.models.towers.discriminator import PatchDiscriminator

    state = {key.removeprefix("disc."): tensor for key, tensor in case.items() if key.startswith("disc.")}
    convolutions = sum(tensor.ndim == 4 for tensor in state.values())
    discriminator = PatchDiscriminator(len(state["main.0.weight"]), convolutions - 2)
    discriminator.load_state_dict(state)
    return discriminator


def _tower_losses(
    given: Tensors, perceptual: PerceptualLoss, discriminator: PatchDiscriminator
) -> dict[str, torch.Tensor]:
    """Of the generator's pass."""
    import torch
    from torch.nn import functional

    from megatron_eve.models.towers.discriminator import adaptive_weight, generator_loss

    weight = given["last.weight"].clone().requires_grad_()
    made = functional.conv2d(given["z"], weight, given["last.bias"], padding=1)
    distances = perceptual(given["x"], made)
    mse = functional.mse_loss(made, given["x"])
    judged = discriminator(made)
    generator = generator_loss(judged)
    reconstruction = mse + distances.mean()
    (of_picture,) = torch.autograd.grad(distances.mean(), made, retain_graph=True)
    (of_reconstruction,) = torch.autograd.grad(reconstruction, weight, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator, weight, retain_graph=True)
    factor = adaptive_weight(of_reconstruction, of_generator)
    total = reconstruction + factor * _ADVERSARIAL * generator
    (of_total,) = torch.autograd.grad(total, weight)
    return {
        "y": made,
        "mse": mse,
        "lpips": distances.mean(),
        "lpips_per_image": distances,
        "lpips_grad_y": of_picture,
        "fake_logits_for_generator": judged,
        "g_loss": generator,
        "adaptive_weight": factor,
        "total_without_commitment": total,
        "grad_last.weight": of_total,
    }


def _discriminator_losses(
    given: Tensors, made: torch.Tensor, discriminator: PatchDiscriminator
) -> dict[str, torch.Tensor]:
    """Of the discriminator's pass, and what is left in it."""
    from megatron_eve.models.towers.discriminator import hinge_loss

    fake, real = discriminator(made), discriminator(given["x"])
    loss = hinge_loss(real, fake)
    discriminator.zero_grad()
    (_ADVERSARIAL * loss).backward()
    found = {"fake_logits": fake, "real_logits": real, "d_loss": loss}
    for key, parameter in discriminator.named_parameters():
        assert parameter.grad is not None
        found[f"disc_grad.{key}"] = parameter.grad
    found |= {f"disc_after.{key}": buffer for key, buffer in discriminator.named_buffers()}
    return found
