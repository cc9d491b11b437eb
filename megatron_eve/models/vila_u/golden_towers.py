"""Golden cases of VILA-U's towers: a quantiser, a whole tower, the losses of training. Imports no torch at its top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eve.config.errors import ConfigError
from megatron_eve.models.golden_format import Comparison, LanguageGolden, tensor_names
from megatron_eve.models.vila_u.golden_losses import loss_comparisons, loss_files
from megatron_eve.models.vila_u.tower_folder import is_tower, read_tower_folder

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.vila_u.quantizer import Quantizer
    from megatron_eve.models.vila_u.tower import UnifiedTower

Tensors = Mapping[str, "torch.Tensor"]

_QUANTIZER = {"x", "eval_z_q", "eval_codes", "before.codebooks.0.weight"}
_INPUTS, _OUTPUTS = "inputs.safetensors", "outputs.safetensors"
_OFFSET = re.compile(r"tower_tokens_offset_(\d+)")


class TowerGolden(LanguageGolden):
    """See `GoldenFormat`: what the public code computed.

    A quantiser's case is files of x, codebooks and eval_*, and of steps of training (train0_x, after0.*) with their
    random draws; a tower's is pictures in inputs.safetensors (`images`) and what became of them in outputs.safetensors,
    beside or around the folder of its weights. The losses of training are a case of their own (`golden_losses`).
    """

    def reads(self, folder: Path) -> bool:
        """See `GoldenFormat.reads`."""
        return bool(_quantizer_files(folder) or loss_files(folder)) or _is_tower_case(folder)

    def comparisons(self, folder: Path) -> Iterator[Comparison]:
        """See `GoldenFormat.comparisons`."""
        from safetensors.torch import load_file

        for path in _quantizer_files(folder):
            case = load_file(path)
            yield from _quantizer_comparisons(path.stem, case)
            yield from _training_comparisons(path.stem, case)
        for path in loss_files(folder):
            yield from loss_comparisons(path.stem, load_file(path))
        if _is_tower_case(folder):
            yield from _tower_comparisons(folder, load_file(folder / _INPUTS), load_file(folder / _OUTPUTS))


def _quantizer_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.safetensors")) if tensor_names(path) >= _QUANTIZER]


def _is_tower_case(folder: Path) -> bool:
    inputs, outputs = folder / _INPUTS, folder / _OUTPUTS
    there = inputs.is_file() and outputs.is_file()
    return there and "images" in tensor_names(inputs) and "codes" in tensor_names(outputs)


def _quantizer_comparisons(name: str, case: Tensors) -> Iterator[Comparison]:
    """Codes, features, loss and gradient of 0.25 loss + sum(features * grad_weight)."""
    import torch

    from megatron_eve.runtime.accelerator import accelerator

    device = accelerator().device
    quantizer = quantizer_of(case).to(device)
    features = case["x"].clone().to(device).requires_grad_()
    found = quantizer(features)
    yield Comparison(f"{name}.eval_codes", found.codes, case["eval_codes"], "exact")
    yield Comparison(f"{name}.eval_z_q", found.features.detach(), case["eval_z_q"], "rounding")
    if "eval_loss" in case:
        yield Comparison(f"{name}.eval_loss", found.commitment_loss.detach(), case["eval_loss"], "rounding")
    if "eval_grad_x" in case and "grad_weight" in case:
        (0.25 * found.commitment_loss + (found.features * case["grad_weight"].to(device)).sum()).backward()
        assert isinstance(features.grad, torch.Tensor)
        yield Comparison(f"{name}.eval_grad_x", features.grad, case["eval_grad_x"], "rounding")


class RecordedDraw:
    """See `RestartDraw`: what the public code drew in a step of training."""

    def __init__(self, case: Tensors, step: int) -> None:
        self._case, self._step = case, step

    def draw(self, level: int, total: int) -> torch.Tensor:
        """See `RestartDraw.draw`."""
        return self._case[f"train{self._step}_randperm_call{level}"]

    def noise(self, level: int, shape: tuple[int, int]) -> torch.Tensor:
        """See `RestartDraw.noise`."""
        return self._case[f"train{self._step}_noise_call{level}"]


def _training_comparisons(name: str, case: Tensors) -> Iterator[Comparison]:
    """Steps of training one after the other: codes, features and loss of each, and the codebooks behind it."""
    from megatron_eve.runtime.accelerator import accelerator

    device = accelerator().device
    quantizer, step = quantizer_of(case).to(device), 0
    # Of settings that a case does not hold, the public code's defaults.
    settings: dict[str, Any] = {key: case[key].item() for key in ("decay", "epsilon") if key in case}
    while f"train{step}_x" in case:
        draw = RecordedDraw(case, step) if f"train{step}_randperm_call0" in case else None
        found = quantizer.train_forward(case[f"train{step}_x"].to(device), draw, **settings)
        ours = {
            f"train{step}_codes": found.codes,
            f"train{step}_z_q": found.features,
            f"train{step}_loss": found.commitment_loss,
            **{f"after{step}.{key}": tensor.clone() for key, tensor in quantizer.state_dict().items()},
        }
        for key, tensor in ours.items():
            if key in case:
                kind = "rounding" if tensor.is_floating_point() else "exact"
                yield Comparison(f"{name}.{key}", tensor, case[key], kind)  # type: ignore[arg-type]
        step += 1


def quantizer_of(case: Tensors) -> Quantizer:
    """The quantiser of a file: its sizes are those of the tensors; a codebook is shared if all depths have the same."""
    import torch

    from megatron_eve.models.vila_u.quantizer import Codebook, Quantizer

    (_, height, width, channels), (_, rows, columns, depth) = case["x"].shape, case["eval_codes"].shape
    given = [case.get(f"before.codebooks.{level}.weight") for level in range(depth)]
    weights = [given[0] if one is None else one for one in given]
    assert weights[0] is not None
    shared = all(one is not None and torch.equal(one, weights[0]) for one in weights)
    sizes = tuple(len(one) - 1 for one in weights if one is not None)
    quantizer = Quantizer((height, width, channels), (rows, columns, depth), sizes, shared)
    for level, (codebook, weight) in enumerate(zip(quantizer.codebooks, weights, strict=True)):
        assert isinstance(codebook, Codebook) and weight is not None
        codebook.weight.copy_(weight)
        for name in ("cluster_size_ema", "embed_ema"):
            if (sums := case.get(f"before.codebooks.{level}.{name}")) is not None:
                getattr(codebook, name).copy_(sums)
    return quantizer


def _tower_comparisons(folder: Path, inputs: Tensors, golden: Tensors) -> Iterator[Comparison]:
    """Everything of a tower's case that its evaluation computes, by the case's names."""
    import torch

    from megatron_eve.models.vila_u.tower import load_tower
    from megatron_eve.runtime.accelerator import accelerator

    device = accelerator().device
    tower = load_tower(read_tower_folder(case_tower(folder)), device, torch.float32)
    with torch.no_grad():
        found = _read(tower, inputs["images"].to(device))
        features = golden.get("z_q", found["z_q"]).to(device)
        found |= _made(tower, golden["codes"].to(device), features)
    for name, ours in found.items():
        if name in golden:
            exact = not ours.is_floating_point()
            kind = "exact" if exact else "rounding" if name in _ROUNDED else "activation"
            yield Comparison(name, ours, golden[name], kind)  # type: ignore[arg-type]
    for name in golden:
        if offset := _OFFSET.fullmatch(name):
            codes = found["codes"].flatten(1, 2) + int(offset[1])
            yield Comparison(name, codes, golden[name], "exact")


# Sums of the same numbers in the same order: within rounding.
_ROUNDED = {
    "z_q", "commitment_loss", "quant_cumulative", "embed_code", "embed_code_with_depth", "tower_image_features",
}  # fmt: skip


def _read(tower: UnifiedTower, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a tower computes of normalised pictures float32 [n, 3, S, S]."""
    import torch

    embedded, *hidden = tower.encoder.hidden_states(images)
    features = hidden[-1].view(len(images), *tower.settings.latent_shape)
    quantized = tower.quantizer(features)
    vectors = tower.quantizer.fold(features)
    sums = [
        tower.quantizer.fold(tower.quantizer.embed(quantized.codes, level + 1))
        for level in range(tower.settings.depth)
    ]
    left = [vectors, *(vectors - total for total in sums)]
    return {
        "patch_embeddings": embedded,
        "n_encoder_layers_run": torch.tensor(len(hidden)),
        **{f"encoder_layer_{number}_out": one for number, one in enumerate(hidden)},
        "pre_quant": features,
        "codes": quantized.codes,
        "z_q": quantized.features,
        "commitment_loss": quantized.commitment_loss,
        "per_depth_commitment": torch.stack([one.square().mean() for one in left[1:]]),
        "residual_norm_per_depth": torch.stack([one.norm(dim=-1).mean() for one in left]),
        "tower_image_features": quantized.features.flatten(1, 2),
    }


def _made(tower: UnifiedTower, codes: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a tower makes of codes [n, h, w, D], and of quantised features [n, H, W, C]."""
    import torch

    quantizer, depths = tower.quantizer, range(1, tower.settings.depth + 1)
    return {
        "quant_cumulative": torch.stack([quantizer.embed(codes, depth) for depth in depths]),
        "embed_code": quantizer.embed(codes),
        "embed_code_with_depth": quantizer.vectors(codes),
        "recon_from_zq": tower.decode_features(features),
        "recon_from_codes": tower.decode_features(quantizer.embed(codes)),
        "recon_uint8_range": tower.decode(codes).permute(0, 3, 1, 2),
    }


def case_tower(folder: Path) -> Path:
    """The folder of the case's weights: in the case, or the model's beside it (`..._model` of `..._tower`)."""
    beside = [folder.parent / folder.name.replace("tower", "model"), *sorted(folder.parent.glob("*_model"))]
    for place in (folder, folder / "model", folder / "hf", *beside):
        for tower in (place, place / "vision_tower"):
            if is_tower(tower):
                return tower
    raise ConfigError(
        f"{folder}: no weights of its tower there, in {folder}/model or in {beside[0]}; copy the case again"
    )
