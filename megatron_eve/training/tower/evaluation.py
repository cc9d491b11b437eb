"""A tower on held-out pairs while training, dataset by dataset: its pictures, and which text belongs to which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_eve.config import RunConfig
from megatron_eve.data.sampling.orders import DatasetSlice
from megatron_eve.data.sampling.pairs import PairLoader, PairStep
from megatron_eve.data.sampling.permutation import sample_order
from megatron_eve.models.towers.contrast import retrieval_accuracy
from megatron_eve.models.towers.global_batch import gather_rows
from megatron_eve.models.towers.tower_training import TowerTraining
from megatron_eve.runtime.accelerator import accelerator
from megatron_eve.runtime.transfer import to_device
from megatron_eve.training.loop.step_result import Values
from megatron_eve.training.tower.networks import TowerNetworks

RECONSTRUCTION, PSNR, PERCEPTUAL = "reconstruction loss", "PSNR", "perceptual loss"
TEXTS_OF_PICTURES, PICTURES_OF_TEXTS = "top-1 texts of pictures", "top-1 pictures of texts"


def evaluate(
    config: RunConfig,
    networks: TowerNetworks,
    settings: TowerTraining,
    loader: PairLoader,
    held_out: Sequence[DatasetSlice],
    sheet: Callable[[], None] | None = None,
) -> dict[str, Values]:
    """Measure a tower on every dataset's held-out pairs; the state of the run does not change. Collective.

    Always the same pairs: those of `--eval-iters` batches of each dataset, or all.

    Args:
        config: of the run.
        networks: see `TowerNetworks`.
        settings: which losses there are.
        loader: of the run; its position in the order does not change.
        held_out: held-out part of each dataset.
        sheet: called with the tower in evaluation mode; on any ranks.

    Returns:
        For each dataset, the same on all ranks: the mean squared error of pictures of -1 .. 1; the mean of the
        pictures' PSNR in dB, of pixel values cut to 0 .. 255; the perceptual loss; and, where the tower has a
        text side, the shares of pictures whose own text is the nearest of all that were measured, and of texts whose
        own picture is.
    """
    for chunk in networks.chunks:
        chunk.eval()
    with torch.no_grad():
        found = {part.name: _measure(config, networks, settings, loader, part) for part in held_out}
    if sheet is not None:
        sheet()
    for chunk in networks.chunks:
        chunk.train()
    return found


def _steps(config: RunConfig, loader: PairLoader, part: DatasetSlice) -> Iterator[PairStep]:
    batch, most = config.training.global_batch_size, config.training.eval_iters
    count = len(part) if most is None else min(len(part), most * batch)
    for start in range(0, count, batch):
        # In a fixed random order, so that the first batches represent all of a dataset, even if it is sorted.
        yield loader.step_of(
            part.samples(sample_order(np.arange(start, min(start + batch, count)), len(part), seed=0))
        )


def _measure(
    config: RunConfig,
    networks: TowerNetworks,
    settings: TowerTraining,
    loader: PairLoader,
    part: DatasetSlice,
) -> Values:
    device, group, tower = accelerator().device, parallel_state.get_data_parallel_group(), networks.tower
    # Also where no loss compares them, to say what the tower knows of texts without it.
    path = settings.contrastive_path if tower.has_texts else None
    empty = torch.zeros(0, tower.config.hidden_size, device=device)
    images, texts = [empty], [empty]
    totals, pairs = torch.zeros(3, dtype=torch.float64, device=device), 0
    for step in _steps(config, loader, part):
        batch, pairs = step.batch(), pairs + len(step.sample_ids)
        if len(step.mine):
            pixels = to_device(batch.pixels, device)
            output, targets = tower.forward(pixels, path), tower.targets(pixels)
            totals += _of_pictures(networks, settings, output.pictures.to(targets.dtype), targets)
            if path is not None and output.images is not None:
                images.append(output.images.float())
                texts.append(tower.text_features(to_device(batch.tokens, device)).float())
    torch.distributed.all_reduce(totals, group=group)
    error, psnr, perceptual = (totals / max(pairs, 1)).tolist()
    found = {RECONSTRUCTION: error, PSNR: psnr}
    if networks.perceptual is not None:
        found[PERCEPTUAL] = perceptual
    if path is not None and pairs:
        # Ranks come one after another here, and pictures stand as their texts do.
        every = [gather_rows(torch.cat(rows), group)[0] for rows in (images, texts)]
        found[TEXTS_OF_PICTURES], found[PICTURES_OF_TEXTS] = retrieval_accuracy(*every)
    return found


def _of_pictures(
    networks: TowerNetworks, settings: TowerTraining, made: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sums over pictures [n, 3, P, P]: float64 [3], of squared error, PSNR and perceptual loss."""
    error = (made - targets).double().square().mean((1, 2, 3))
    visible = ((made.clamp(-1, 1) - targets).double().square().mean((1, 2, 3)) / 4).clamp_min(1e-10)
    perceptual = error.new_zeros(())
    if networks.perceptual is not None and settings.perceptual_weight:
        perceptual = networks.perceptual(made, targets).double().sum()
    return torch.stack([error.sum(), (-10 * visible.log10()).sum(), perceptual])
