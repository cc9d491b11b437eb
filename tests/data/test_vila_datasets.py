"""Datasets of a family whose pictures are squares: what binds them, and that every storage gives the same views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.config import parse
from megatron_eve.data.batch import build_batch
from megatron_eve.data.errors import DataError
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.images import view_of
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset
from megatron_eve.data.opening import open_datasets
from megatron_eve.data.text.conversation import Encoded
from megatron_eve.models.model_parts import ImageShare
from megatron_eve.models.vila.geometry import planner
from tests.data.helpers import MakeConfig, caption_row, encoded, opened, run, text_row
from tests.data.images.test_decoders import photo

TINY = {"image_size": 56, "vision_patch_size": 14, "projector_type": "mlp_downsample_3x3_fix"}
VIEWS: dict[str, Any] = {"tensor_parallel": 1, "context_parallel": 1, "views": ["tower"]}


def needs(dataset: Any, **settings: Any) -> dict[str, Any]:
    info = dataset.info
    return {
        "tokenizer_sha256": None,
        "vocab_size": info.vocab_size,
        "family": "vila",
        "image_settings": TINY | {"image_fit": "pad", "vision_model_type": "clip"} | settings,
    }


@pytest.fixture
def rows(make_config: MakeConfig, tmp_path: Path) -> list[dict[str, Any]]:
    """Wide, tall and small pictures, and a row without one."""
    sizes = {"wide.jpg": (300, 120), "tall.jpg": (90, 260), "small.png": (40, 30)}
    for name, size in sizes.items():
        kind = "PNG" if name.endswith("png") else "JPEG"
        (tmp_path / "photos" / name).write_bytes(encoded(photo(*size), kind))
    return [*(caption_row(n, name) for n, name in enumerate(sizes)), text_row()]


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("decoder", ["pillow", "threads"])
def test_every_storage_gives_the_same_views(
    make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path, fit: str, decoder: str
) -> None:
    settings = TINY | {"image_fit": fit}
    images = [Image.open(tmp_path / "photos" / name) for name in ("wide.jpg", "tall.jpg", "small.png")]
    expected = torch.stack(
        [torch.from_numpy(view_of(image, planner(settings)(*image.size).views["tower"])) for image in images]
    )
    found = {}
    for storage in ("encoded", "jpeg", "pixels"):
        config = make_config(
            rows,
            template="vicuna_v1",
            family="vila",
            image_settings=settings,
            image_storage=storage,
            output_prefix=str(tmp_path / storage),
            **({"image_decoder": decoder, "jpeg_quality": 100} if storage != "encoded" else {}),
        )
        run(config)
        dataset = open_dataset(config.output_prefix)
        dataset.use_image_settings("vila", settings)
        assert list(check_dataset(dataset, CheckCounts(), workers=1, advance=lambda num_bytes: None)) == []
        batch = build_batch(dataset, range(4), **VIEWS)
        assert batch.image_rows.tolist() == [4, 4, 4] and batch.image_grids.tolist() == [[2, 2]] * 3
        assert (np.diff(batch.cu_seqlens.numpy()) == dataset.lengths(np.arange(4))).all()
        assert batch.damaged == {}
        found[storage] = batch.pixels["tower"]
    assert torch.equal(found["encoded"], expected)
    # The threads' own resize rounds otherwise; JPEG loses some.
    assert (found["pixels"].int() - expected.int()).abs().max() <= (0 if decoder == "pillow" else 9)
    assert torch.equal(found["jpeg"][2], expected[2])  # it stays as it is: a square of it would be larger
    assert 0 < (found["jpeg"].int() - expected.int()).abs().float().mean() < 4


def test_what_binds_a_dataset(make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Files fit however a picture becomes a square; what is stored as a square is bound to how it became one."""
    datasets = {}
    for storage in ("encoded", "jpeg", "pixels"):
        config = make_config(
            rows, template="vicuna_v1", family="vila", image_settings=TINY, image_storage=storage,
            output_prefix=str(tmp_path / storage),
        )  # fmt: skip
        run(config)
        datasets[storage] = opened(config)
        datasets[storage].check_compatible(**needs(datasets[storage]))
        with pytest.raises(
            DataError, match="was made for image size 56 and the run has 112: use the matching"
        ):
            datasets[storage].check_compatible(**needs(datasets[storage], image_size=112))
    files = datasets["encoded"]
    assert files.info.image_settings == TINY | {"qformer_num_queries": 64}
    files.check_compatible(**needs(files, image_fit="crop", vision_model_type="siglip"))
    files.use_image_settings("vila", TINY | {"image_fit": "crop"})
    assert files.image_plan(0).views["tower"].fit == "crop"
    for storage, held in (("jpeg", "JPEG files"), ("pixels", "pixels")):
        with pytest.raises(DataError) as caught:
            datasets[storage].check_compatible(**needs(datasets[storage], image_fit="crop"))
        assert str(caught.value) == (
            f"{tmp_path}/{storage}_dataset.json holds {held} that were made for image fit pad and the run has crop: "
            "preprocess the data with --image-fit crop, or with --image-storage encoded, which fits any image fit"
        )
    merged = str(tmp_path / "all")
    merge_datasets(merged, [datasets["jpeg"].prefix, datasets["pixels"].prefix])
    with pytest.raises(DataError, match="holds JPEG files that were made for image fit pad"):
        open_dataset(merged).check_compatible(**needs(files, image_fit="crop"))


def test_projectors_of_as_many_rows_are_alike(
    make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = make_config(
        rows, template="vicuna_v1", family="vila", image_settings=TINY | {"projector_type": "linear"}
    )
    run(config)
    dataset = opened(config)
    dataset.check_compatible(**needs(dataset, projector_type="mlp3x_gelu"))
    with pytest.raises(DataError, match="made for projector type linear and the run has mlp_downsample"):
        dataset.check_compatible(**needs(dataset, projector_type="mlp_downsample"))


def test_text_made_for_another_family_is_trained_on(
    make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A text is the same for every model with its tokenizer; it needs no image settings."""
    texts = make_config(
        [text_row(), text_row("How?")],
        template="vicuna_v1",
        tokenizer_legacy=False,
        output_prefix=str(tmp_path / "texts"),
    )
    run(texts)
    pictures = make_config(
        rows,
        template="vicuna_v1",
        family="vila",
        image_settings=TINY,
        output_prefix=str(tmp_path / "pictures"),
    )
    run(pictures)
    assert opened(texts).info.family == "eve"
    merge_datasets(str(tmp_path / "all"), [texts.output_prefix, pictures.output_prefix])
    config = parse(
        ["--preset", "vila_tiny", "--global-batch-size", "2", "--train-iters", "1", "--image-size", "56",
         "--projector-type", "mlp_downsample_3x3_fix", "--image-fit", "crop", "--seq-length", "256",
         "--vocab-size", str(opened(texts).info.vocab_size), "--tokenizer-model", texts.tokenizer_model,
         "--data-path", texts.output_prefix, pictures.output_prefix, str(tmp_path / "all")]
    )  # fmt: skip
    joined = open_datasets(config).joined()
    assert len(joined) == 2 + 4 + 6
    assert joined.image_plan(0).views["tower"].fit == "crop"
    batch = build_batch(joined, range(len(joined)), **VIEWS)
    assert tuple(batch.pixels["tower"].shape) == (6, 56, 56, 3)


@pytest.mark.parametrize("storage", ["encoded", "jpeg", "pixels"])
def test_pictures_in_tiles(
    make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path, storage: str
) -> None:
    """Each file once, a placeholder and a newline by tile, and a share of the tiles on each rank."""
    settings = TINY | {"image_fit": "tiles", "max_tiles": 6}
    config = make_config(
        rows, template="vicuna_v1", family="vila", image_settings=settings, image_storage=storage,
        **({} if storage == "encoded" else {"image_decoder": "pillow", "jpeg_quality": 100}),
    )  # fmt: skip
    run(config)
    dataset = open_dataset(config.output_prefix)
    dataset.use_image_settings("vila", TINY | {"image_fit": "tiles", "max_tiles": 12})
    assert list(check_dataset(dataset, CheckCounts(), workers=1, advance=lambda num_bytes: None)) == []
    tiles = [4, 4, 7]  # 3 x 1, 1 x 3 and 3 x 2 (smaller than a tile, yet enlarged), each with the whole
    assert dataset.info.num_images == 3 and dataset.samples["num_images"].tolist() == [1, 1, 1, 0]
    tokens, labels = dataset.text(0)
    places = np.flatnonzero(tokens == -200)
    assert len(places) == 4 and (labels[: places[-1] + 1] == -100).all()
    assert (np.diff(places) == places[1] - places[0]).all() and places[1] - places[0] > 1  # a newline between
    whole = build_batch(dataset, range(4), **VIEWS)
    assert whole.image_rows.tolist() == [4] * 15 and whole.image_grids.tolist() == [[2, 2]] * 15
    assert (np.diff(whole.cu_seqlens.numpy()) == dataset.lengths(np.arange(4))).all()
    assert whole.pixels["tower"].shape == whole.pixel_shapes["tower"] == (15, 56, 56, 3)
    images = [Image.open(tmp_path / "photos" / name) for name in ("wide.jpg", "tall.jpg", "small.png")]
    views = [planner(settings)(*image.size).views["tower"] for image in images]
    assert [view.shape[0] for view in views] == tiles
    expected = np.concatenate([view_of(image, view) for image, view in zip(images, views, strict=True)])
    difference = abs(whole.pixels["tower"].numpy().astype(int) - expected)
    assert difference.max() == 0 if storage != "jpeg" else difference.mean() < 4
    shares = [
        build_batch(
            dataset, range(4), tensor_parallel=1, context_parallel=1, views=[], shared_views=["tower"],
            share=ImageShare(rank, 3),
        ).pixels["tower"]
        for rank in range(3)
    ]  # fmt: skip
    assert [len(share) for share in shares] == [5, 5, 5] and torch.equal(
        torch.cat(shares), whole.pixels["tower"]
    )


def test_tiles_bind_a_dataset(make_config: MakeConfig, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """A run takes datasets of as many tiles as it has, or fewer; one without tiles takes none."""
    settings = TINY | {"image_fit": "tiles", "max_tiles": 6}
    config = make_config(rows, template="vicuna_v1", family="vila", image_settings=settings)
    run(config)
    dataset = opened(config)
    dataset.check_compatible(**needs(dataset, image_fit="tiles", max_tiles=12))
    remedy = r"made for max tiles 6 and the run has 1: use the .*\(--image-fit tiles --max-tiles 6\), or"
    with pytest.raises(DataError, match=remedy):
        dataset.check_compatible(**needs(dataset, max_tiles=1))
    with pytest.raises(DataError, match="--max-tiles 6: is for --image-fit tiles, and this is pad"):
        run(make_config(rows, family="vila", image_settings=settings | {"image_fit": "pad"}))


def test_a_picture_whose_tiles_do_not_all_fit_is_dropped() -> None:
    whole = Encoded([1, -200, 9, -200, 9, 7, -200, 9, -200, 9, 7], [-100] * 11)
    for length, kept in ((100, 11), (16, 6), (12, 6), (11, 5), (10, 4), (9, 1), (1, 1)):
        cut = whole.cut(length, [[4, 4], [4, 4]])
        assert len(cut.tokens) == kept, length
        assert cut.whole_images([2, 2]) == {11: 2, 6: 1, 5: 1, 4: 1, 1: 0}[kept]
