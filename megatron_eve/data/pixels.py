"""The pictures of a pack to pixels: which views of which images a rank decodes, and how they lie together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch

from megatron_eve.data.dataset import VisionDataset
from megatron_eve.data.images import ImageError
from megatron_eve.data.images.backends import placeholder_image
from megatron_eve.data.images.interface import DecodeSettings, ImageDecoder, ImageTask, Views
from megatron_eve.data.images.patches import from_stored
from megatron_eve.data.images.pillow import PillowDecoder
from megatron_eve.models.family import ImagePlan, ImagePlanner, View
from megatron_eve.models.model_parts import ImageShare


def decode_settings(dataset: VisionDataset) -> DecodeSettings:
    """What decoding a dataset's pictures needs to know, beside the pictures."""
    return DecodeSettings(dataset.info.apply_exif, dataset.info.max_pixels)


def pack_shapes(plans: Sequence[ImagePlan], planner: ImagePlanner) -> dict[str, tuple[int, ...]]:
    """Shape of each view of all images of a pack.

    Args:
        plans: of the images.
        planner: gives the other sides of the shapes where there is no image.

    Returns:
        For each view (patches of all images, 3 * patch_size ** 2) or (tiles of all images, tile, tile, 3) if it is cut,
        else (images, height, width, 3).
    """
    return {
        name: _pack_shape(view, [plan.views[name] for plan in plans])
        for name, view in (plans[0] if plans else planner(1, 1)).views.items()
    }


def _pack_shape(like: View, views: Sequence[View]) -> tuple[int, ...]:
    if like.is_cut:
        return sum(view.shape[0] for view in views), *like.shape[1:]
    return len(views), *like.shape


def decode_pixels(
    dataset: VisionDataset,
    images: Sequence[int],
    plans: Sequence[ImagePlan],
    views: Collection[str],
    shared_views: Collection[str],
    share: ImageShare | None,
    decoder: ImageDecoder | None,
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Decode the images of a pack.

    Each file is decoded once; one that cannot be is replaced by a placeholder image. Stored pixels are taken as they
    are.

    Args:
        dataset: where the images lie.
        images: their numbers in it.
        plans: of the images.
        views: wanted of all images.
        shared_views: wanted of this rank's share of them, or of their tiles: two ranks may decode the same image.
        share: which these are; None: none, and no shared view is given.
        decoder: decodes files; by default the plain reference.

    Returns:
        Each view, uint8: patches [P, 3 * patch_size ** 2] or tiles [.., tile, tile, 3] if it is cut, else
        [images, height, width, 3]. And the
        images that could not be decoded, with their names and why.
    """
    shared_views = shared_views if share else ()
    mine = _shares(plans, share) if share else [range(0)] * len(plans)
    wanted = [
        {name: view for name, view in plan.views.items() if name in views or (name in shared_views and tiles)}
        for plan, tiles in zip(plans, mine, strict=True)
    ]
    found: dict[int, Views] = {}
    tasks: dict[int, ImageTask] = {}
    for i, some in enumerate(wanted):
        if not some:
            continue
        stored = dataset.stored_pixels(images[i])
        if stored is None:
            tasks[i] = ImageTask(dataset.image_bytes(images[i]), some)
        else:
            found[i] = {
                name: torch.from_numpy(from_stored(stored[name], view)) for name, view in some.items()
            }
    damaged: dict[int, str] = {}
    if tasks:
        results = (decoder or PillowDecoder(decode_settings(dataset))).prepare(list(tasks.values()))
        for (i, task), result in zip(tasks.items(), results, strict=True):
            if isinstance(result, ImageError):
                damaged[images[i]] = f"{dataset.image_name(images[i])}: {result}"
                result = {name: placeholder_image(view) for name, view in task.views.items()}
            found[i] = result
    pixels: dict[str, torch.Tensor] = {}
    for name, view in (plans[0] if plans else dataset.planner(1, 1)).views.items():
        if name in views or name in shared_views:
            parts = [(found[i][name], mine[i]) for i, some in enumerate(wanted) if name in some]
            of_share = view.tile and name not in views
            pixels[name] = _together(
                view, [part[of.start : of.stop] if of_share else part for part, of in parts]
            )
    return pixels, damaged


def _shares(plans: Sequence[ImagePlan], share: ImageShare) -> list[range]:
    """Tiles of each image that this rank has: the tiles of all images of a pack are shared out."""
    ends = list(accumulate(plan.tiles for plan in plans))
    mine = share.images(ends[-1] if ends else 0)
    return [
        range(max(mine.start - end + plan.tiles, 0), max(min(mine.stop - end, 0) + plan.tiles, 0))
        for plan, end in zip(plans, ends, strict=True)
    ]


def _together(like: View, parts: list[torch.Tensor]) -> torch.Tensor:
    """Join one view of several images, of which a placeholder may lie on the host and the others on a GPU."""
    if not parts:
        return torch.empty(_pack_shape(like, ()), dtype=torch.uint8)
    device = next((part.device for part in parts if part.is_cuda), parts[0].device)
    parts = [part.to(device) for part in parts]
    return torch.cat(parts) if like.is_cut else torch.stack(parts)
