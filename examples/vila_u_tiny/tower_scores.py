"""What a trained toy tower has learnt, measured on pairs: its pictures by depth, its codes, its retrieval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from vila_u_tiny.pairs import Pair
from vila_u_tiny.toy_siglip import Retrieval, retrieval, token_ids

from megatron_eve.models.vila_u.tower_config import TowerConfig, siglip_fields
from megatron_eve.models.vila_u.tower_folder import read_tower_folder

if TYPE_CHECKING:
    import torch

    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower

_LEAST_ERROR = 255**2 * 1e-10
"""Mean squared error of a picture, so that an exact one has 100 dB."""


@dataclass(frozen=True)
class Score:
    """What comes out on the pairs.

    Attributes:
        psnr: mean of the pictures' PSNR in dB, from the codes of depth 1 alone, of depths 1 and 2, and so on.
        mean_colours: the same of pictures in which the square of each position with codes has its mean colour.
        in_use: share of the vectors of all codebooks that are taken; of a shared one, by any depth.
        in_use_by_depth: the same of each depth alone.
        perplexity: exp of the entropy of the codes' frequencies, by depth.
        retrieval: among the pairs.
    """

    psnr: list[float]
    mean_colours: float
    in_use: float
    in_use_by_depth: list[float]
    perplexity: list[float]
    retrieval: Retrieval


def read_score(path: Path) -> Score:
    """A score that was written as JSON."""
    return _of(json.loads(path.read_text(encoding="utf-8")))


def mean_score(some: Sequence[dict[str, Any]]) -> Score:
    """The mean of several scores, each as JSON has it."""
    scores = [_of(one) for one in some]
    found: dict[str, Any] = {
        field.name: np.mean([getattr(one, field.name) for one in scores], axis=0).tolist()
        for field in fields(Score)
        if field.name != "retrieval"
    }
    shares = np.mean([astuple(one.retrieval) for one in scores], axis=0).tolist()
    return Score(**found, retrieval=Retrieval(*shares))


def _of(values: dict[str, Any]) -> Score:
    return Score(**{**values, "retrieval": Retrieval(**values["retrieval"])})


def load_trained(checkpoint: Path, siglip: Path) -> VILAUTrainableTower:
    """The tower of a run's checkpoint in evaluation, with its text side.

    Args:
        checkpoint: the run's folder.
        siglip: that the run started from.
    """
    from megatron_eve.runtime.accelerator import accelerator

    accelerator()  # before megatron-core is imported
    from megatron_eve.models.vila_u.tower_start import load_tower, text_fields
    from megatron_eve.models.vila_u.trainable_tower import VILAUTrainableTower

    settings = read_tower_folder(checkpoint)
    tower = VILAUTrainableTower(settings, text_fields(siglip_fields(TowerConfig(vision_tower=str(siglip)))))
    load_tower(tower, settings, contrast=True, flag="checkpoint")
    return tower.eval().requires_grad_(False)


def score(tower: VILAUTrainableTower, pairs: Sequence[Pair], tokenizer: Path) -> Score:
    """Score a tower, whose codebooks have one size."""
    import torch

    pictures = np.stack([pair.pixels for pair in pairs])
    pixels, sentences = torch.from_numpy(pictures), [pair.sentence for pair in pairs]
    with torch.no_grad():
        quantized = tower.quantize(pixels)
        codes = quantized.codes
        images = tower.image_features(quantized.features)
        texts = tower.text_features(token_ids(sentences, tokenizer))
    grid, depths = codes.shape[1], range(codes.shape[-1])
    counts = torch.stack(
        [codes[..., depth].flatten().bincount(minlength=tower.settings.codebook_size) for depth in depths]
    )
    taken = counts > 0
    return Score(
        psnr=[psnr(tower.decode(codes, depth + 1).numpy(), pictures) for depth in depths],
        mean_colours=psnr(mean_colours(pictures, grid), pictures),
        in_use=(taken.any(0) if tower.settings.shared_codebook else taken).float().mean().item(),
        in_use_by_depth=taken.float().mean(1).tolist(),
        perplexity=_perplexity(counts),
        retrieval=retrieval(images, texts, sentences),
    )


def psnr(made: NDArray[np.floating], pictures: NDArray[np.uint8]) -> float:
    """Mean over pictures [n, S, S, 3], 0 .. 255, of their peak signal-to-noise ratio in dB, each at most 100."""
    error = np.square(made.astype(np.float64) - pictures).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, _LEAST_ERROR))).mean())


def mean_colours(pictures: NDArray[np.uint8], grid: int) -> NDArray[np.float64]:
    """Pictures [n, S, S, 3] with one colour, the mean, in each of grid x grid squares."""
    count, side = len(pictures), pictures.shape[1] // grid
    squares = pictures.reshape(count, grid, side, grid, side, 3).astype(np.float64)
    return np.broadcast_to(squares.mean((2, 4), keepdims=True), squares.shape).reshape(pictures.shape)


def _perplexity(counts: torch.Tensor) -> list[float]:
    import torch

    shares = counts.double() / counts.sum(1, keepdim=True)
    return (-torch.special.xlogy(shares, shares).sum(1)).exp().tolist()  # type: ignore[no-any-return]
