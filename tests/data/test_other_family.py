"""Datasets of another family than those of the package: made, opened, inspected and packed by its plan of a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_eve.data.batch import build_batch
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.images import decode_image, resize
from megatron_eve.data.inspecting.checking import CheckCounts, check_dataset
from megatron_eve.data.inspecting.inspection import write_inspection
from tests.data.helpers import MakeConfig, caption_row, encoded, picture, text_row
from tests.data.images.test_decoders import photo
from tests.data.preprocessing.test_preprocess_command import flags, load_tool

# Each picture is a square of one size, without patches, and one of half that size with margins: 5 tokens in 1 row.
FAMILY = """
from dataclasses import dataclass

from megatron_eve.models.family import ImagePlan, ModelFamily, View
from megatron_eve.models.image_flags import ImageFlag
from megatron_eve.models.hf_format import HFFormat


@dataclass(frozen=True)
class Config:
    pass


class Format(HFFormat):
    title = "another"
    model_types = ("another",)


class Family(ModelFamily):
    name = "toy"
    Config = Config

    def hugging_face(self):
        return Format()

    presets = stages = parts = {}
    image_flags = {
        "side": ImageFlag(40, "side of a picture"),
        "icon_side": ImageFlag(10, "side of its icon", ("pixels",)),
    }

    def check_sizes(self, config):
        yield from ()

    check = check_sizes

    def objectives(self, config):
        return ()

    def image_settings(self, config):
        return {}

    def check_image_settings(self, settings):
        if settings["side"] < 1:
            yield f"--side {settings['side']}: use 1 or more"

    def image_planner(self, settings):
        side, icon = (settings.get(name, flag.default) for name, flag in self.image_flags.items())

        def plan(width, height):
            if min(width, height) < 1:
                raise ValueError("no area")
            grey = (9, 9, 9)
            views = {"picture": View(side, side, grey), "icon": View(icon, icon // 2, grey, square=icon)}
            return ImagePlan(5, (1, 5), views)

        return plan

    def views(self, config):
        return {}


FAMILY = Family()
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of its module."""
    name = f"toy_{tmp_path.name}"
    (tmp_path / "families" / name).mkdir(parents=True)
    (tmp_path / "families" / name / "__init__.py").touch()
    (tmp_path / "families" / name / "family.py").write_text(FAMILY)
    monkeypatch.syspath_prepend(str(tmp_path / "families"))
    return f"{name}.family"


@pytest.mark.parametrize("storage", ["encoded", "jpeg", "pixels"])
def test_a_dataset_of_another_family(
    make_config: MakeConfig, tmp_path: Path, family: str, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded(photo(120, 90), "JPEG", quality=95))
    (tmp_path / "photos" / "b.png").write_bytes(encoded(picture(70, 80), "PNG"))
    config = make_config([caption_row(0, "a.jpg"), text_row(), caption_row(2, "b.png")])
    more = ["--template", "vicuna_v1", "--family", family, "--side", "32", "--icon-side", "12"]
    more += ["--image-storage", storage, *(["--image-decoder", "pillow"] if storage != "encoded" else [])]
    assert load_tool().main(flags(config, *more)) == 0, capsys.readouterr().err
    manifest = json.loads(Path(f"{config.output_prefix}_dataset.json").read_text())
    assert (manifest["family"], manifest["image_settings"], manifest["format_version"]) == (
        family,
        {"side": 32},
        4,
    )
    dataset = open_dataset(config.output_prefix)
    assert list(check_dataset(dataset, CheckCounts(), workers=1, advance=lambda num_bytes: None)) == []
    write_inspection(dataset, "set", tmp_path / "look", [0, 1, 2], None)
    assert "side 32" in (tmp_path / "look" / "index.html").read_text()

    dataset.use_image_settings(family, {"side": 32, "icon_side": 12})
    views: dict[str, Any] = {"views": ["picture", "icon"]}
    batch = build_batch(dataset, range(3), tensor_parallel=1, context_parallel=1, **views)
    assert batch.image_rows.tolist() == [5, 5] and batch.image_grids.tolist() == [[1, 5], [1, 5]]
    assert (np.diff(batch.cu_seqlens.numpy()) == dataset.lengths(np.arange(3))).all()
    shapes = {"picture": (2, 32, 32, 3), "icon": (2, 12, 12, 3)}
    assert {name: tuple(one.shape) for name, one in batch.pixels.items()} == shapes == batch.pixel_shapes
    assert batch.pixels["icon"][:, :3].unique().tolist() == [9]
    if storage != "jpeg":
        image = decode_image((tmp_path / "photos" / "a.jpg").read_bytes(), apply_exif=True, max_pixels=10**6)
        assert torch.equal(batch.pixels["picture"][0], torch.from_numpy(resize(image, 32, 32)))
    empty = build_batch(dataset, [1], tensor_parallel=1, context_parallel=1, **views)
    assert {name: tuple(one.shape) for name, one in empty.pixels.items()} == {
        "picture": (0, 32, 32, 3),
        "icon": (0, 12, 12, 3),
    }


def test_its_sizes_are_its_own_flags(
    make_config: MakeConfig, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config([text_row()])
    tool = load_tool()
    assert tool.main(flags(config, "--template", "vicuna_v1", "--family", family, "--side", "0")) == 2
    assert "error: --side 0: use 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(flags(config, "--family", family, "--image-size", "672"))
    assert "error: --image-size: no such flag; " in capsys.readouterr().err
    assert tool.main(flags(config, "--family", "nobody")) == 2
    assert "error: --family nobody: no such family; choose one of eve" in capsys.readouterr().err
