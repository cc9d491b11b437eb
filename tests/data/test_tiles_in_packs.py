"""Pictures in tiles among others in a run: packs and their shares, and that tiles are what packs are balanced by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.config import RunConfig, parse
from megatron_eve.data.batch import build_batch
from megatron_eve.data.dataset import planned_tiles
from megatron_eve.data.format.indexed import DatasetSettings, DatasetWriter, StoredImage
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.opening import open_datasets
from megatron_eve.data.sampling.loader import StepLoader
from megatron_eve.models.model_parts import ImageShare
from tests.data.helpers import encoded, picture

# Four rows a tile: a grid of 4 x 4 features in blocks of 3 x 3.
SIZES = {"image_size": 56, "vision_patch_size": 14, "projector_type": "mlp_downsample_3x3_fix"}
# Tiles of a picture of 10 : 1, and of a square one, with 12 at most.
LONG, SQUARE = ((560, 56), 11), ((56, 56), 1)
NEWLINE = 9


def write(
    prefix: Path, samples: list[tuple[list[tuple[tuple[int, int], int]], int]], max_tiles: int = 12
) -> str:
    """A dataset of samples of pictures, each with its tiles, and of so many tokens of text."""
    settings = DatasetSettings(
        template="plain", family="vila", image_settings={**SIZES, "max_tiles": max_tiles}, model_max_length=2048,
        apply_exif=False, max_pixels=1 << 20, tokenizer_sha256="ab" * 32, vocab_size=384,
    )  # fmt: skip
    with DatasetWriter(prefix, settings) as writer:
        for pictures, words in samples:
            text = (np.arange(words) % 300 + 30).tolist()
            tiles = sum(tiles if max_tiles > 1 else 1 for _, tiles in pictures)
            head = [1, *[-200, NEWLINE] * tiles]
            images = [StoredImage(encoded(picture(*size), "PNG"), *size) for size, _ in pictures]
            writer.add_sample([*head, *text], [*[-100] * len(head), *text], images)
        writer.finalise()
    return str(prefix)


def config_of(*prefixes: str, flags: tuple[str, ...] = ()) -> RunConfig:
    return parse(
        ["--preset", "vila_tiny", "--global-batch-size", "4", "--train-iters", "1", "--image-size", "56",
         "--projector-type", "mlp_downsample_3x3_fix", "--image-fit", "tiles", "--seq-length", "1024",
         "--vocab-size", "384", *flags, "--data-path", *prefixes]
    )  # fmt: skip


def test_one_tile_and_several_share_a_pack(tmp_path: Path) -> None:
    """Pairs and frames of one tile each beside pictures in tiles, and a merged dataset beside another."""
    samples: list[Any] = [([LONG], 5), ([], 6), ([SQUARE, LONG], 7)]
    ones = write(tmp_path / "ones", samples, max_tiles=1)
    several = write(tmp_path / "several", samples)
    merge_datasets(str(tmp_path / "merged"), [ones])
    datasets = open_datasets(config_of(str(tmp_path / "merged"), several))
    joined, everything = datasets.joined(), np.arange(6)
    assert datasets.dropped == ()
    assert joined.tile_counts(everything).tolist() == [1, 0, 2, 11, 0, 12]
    assert joined.tile_counts(everything[[5, 0, 5]]).tolist() == [12, 1, 12]
    assert planned_tiles(joined, everything).tolist() == joined.tile_counts(everything).tolist()
    for order in (range(6), range(5, -1, -1)):
        alike: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1}
        whole = build_batch(joined, order, views=["tower"], **alike)
        assert whole.pixels["tower"].shape == whole.pixel_shapes["tower"] == (26, 56, 56, 3)
        shares = [
            build_batch(joined, order, views=[], shared_views=["tower"], share=ImageShare(rank, 4), **alike)
            for rank in range(4)
        ]
        assert [len(share.pixels["tower"]) for share in shares] == [7, 7, 7, 5]
        assert torch.equal(torch.cat([share.pixels["tower"] for share in shares]), whole.pixels["tower"])


def test_samples_of_too_many_tiles_are_left_out_and_named(tmp_path: Path) -> None:
    prefix = write(tmp_path / "set", [([SQUARE] * 3, 5), ([LONG], 5), ([SQUARE, LONG], 5)])
    assert open_datasets(config_of(prefix, flags=("--max-images-per-pack", "12"))).dropped == ()
    datasets = open_datasets(config_of(prefix, flags=("--max-images-per-pack", "10")))
    assert len(datasets.training[0]) == 1
    (told,) = datasets.dropped
    assert told == (
        f"2 of 3 samples cannot be packed and are left out: row 1 of {prefix} (61 tokens, 1 images in 11 tiles), "
        f"row 2 of {prefix} (66 tokens, 2 images in 12 tiles); 2 with more images, tile by tile, than "
        "--max-images-per-pack 10 (raise it to 12 or more)"
    )


@pytest.mark.parametrize("limit", [None, 14])
def test_packs_are_balanced_by_tiles(tmp_path: Path, limit: int | None) -> None:
    """Four samples of about one length and one picture each: the two whose pictures are 11 tiles are apart."""
    prefix = write(tmp_path / "set", [([SQUARE], 60), ([LONG], 8), ([LONG], 7), ([SQUARE], 50)])
    dataset = open_datasets(config_of(prefix)).datasets[0]
    assert dataset.lengths(np.arange(4)).tolist() == [66, 64, 63, 56]

    def tiles(image_work: float, max_images: int | None) -> list[int]:
        """Of the pack of each of two data-parallel ranks."""
        found = []
        for rank in range(2):
            loader = StepLoader(
                dataset, lambda places: places, global_batch_size=4, seq_length=1024, data_parallel_rank=rank,
                data_parallel_size=2, image_work=image_work, max_images=max_images, views=["tower"],
            )  # fmt: skip
            found += [len(batch.pixels["tower"]) for batch in loader.step(0).batches]
            loader.close()
        return sorted(found)

    assert tiles(0.0, None) == [2, 22]  # alike in length alone
    assert tiles(50.0 if limit is None else 0.0, limit) == [12, 12]
