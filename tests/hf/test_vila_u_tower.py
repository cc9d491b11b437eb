"""VILA-U's tower for transformers: the codes and pictures of our own, by classes that a folder carries."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_eve.data.images.decode import decode_image
from megatron_eve.data.images.squares import FITS, square_of
from megatron_eve.models.vila_u.tower import load_tower
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from tests.convert.test_conversion import convert
from tests.convert.test_towers import RESIZED
from tests.golden_dir import find_golden
from tests.models.vila_u.test_tower import pictures
from tests.models.vila_u.towers import CONFIG, write_tower

# Codes and reconstruction of a folder for pixel values of a file, by the folder's own code.
PROGRAM = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
out = model(torch.load(sys.argv[2]))
torch.save({"codes": out.codes, "reconstruction": out.reconstruction.detach()}, sys.argv[3])
assert "megatron_eve" not in sys.modules
"""


def exported(source: Path, place: Path) -> Path:
    """The folder for transformers of a published one."""
    assert convert("import", "--source", source, "--target", place / "run") == 0
    assert (
        convert("export", "--source", place / "run", "--target", place / "hf", "--format", "transformers")
        == 0
    )
    return place / "hf"


def loaded(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModel

    import megatron_eve.hf  # noqa: F401

    return AutoModel.from_pretrained(folder, **settings).eval()


@pytest.mark.parametrize("config", [CONFIG, RESIZED], ids=["shared", "separate-resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_codes_and_pictures_of_a_thousand(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_tower(tmp_path / "tower", config)
    model = loaded(exported(source, tmp_path), dtype=dtype)
    ours = load_tower(read_tower_folder(source), torch.device("cpu"), dtype)
    shown = pictures(1000, 32)
    values = shown.float().div(255).sub(0.5).div(0.5).permute(0, 3, 1, 2)
    codes = torch.cat([model.encode(some) for some in values.split(100)])
    assert torch.equal(codes, torch.cat([ours.encode(some) for some in shown.split(100)]))
    assert codes.unique().numel() > 20
    for depth in (1, None):
        made = model.decode(codes[:4], depth).float().add(1).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1)
        assert torch.allclose(
            made, ours.decode(codes[:4], depth), atol=1e-5 * 255 if dtype == torch.float32 else 0
        )


def test_the_golden_tower(tmp_path: Path) -> None:
    case = find_golden("vila/vilau_tower")
    inputs, outputs = load_file(case / "inputs.safetensors"), load_file(case / "outputs.safetensors")
    model = loaded(exported(find_golden("vila/vilau_model") / "vision_tower", tmp_path))
    found = model(inputs["images"])
    assert torch.equal(found.codes, outputs["codes"])
    for ours, theirs, tolerance in (
        (found.features, outputs["embed_code"], 1e-6),
        (found.reconstruction, outputs["recon_from_codes"], 5e-6),
    ):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_a_folder_needs_nothing_of_this_project(tmp_path: Path) -> None:
    folder = exported(write_tower(tmp_path / "tower"), tmp_path)
    run_alone(folder, tmp_path, {})


@pytest.mark.slow
def test_a_folder_under_an_older_transformers(tmp_path: Path) -> None:
    from tests.hf.test_fine_tuning import OLDER

    other = tmp_path / "other"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other), *OLDER],
        check=True,
    )
    folder = exported(write_tower(tmp_path / "tower", RESIZED), tmp_path)
    run_alone(folder, tmp_path, {"PYTHONPATH": str(other)})


def run_alone(folder: Path, place: Path, environment: dict[str, str]) -> None:
    """The folder's own code in a process of its own gives what ours gives."""
    shown = pictures(20, 32)
    torch.save(shown.float().div(255).sub(0.5).div(0.5).permute(0, 3, 1, 2), place / "values")
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(place / "values"), str(place / "found")],
        check=True, cwd=place, env={**os.environ, "HF_MODULES_CACHE": str(place / "cache"), **environment},
    )  # fmt: skip
    found = torch.load(place / "found")
    ours = load_tower(read_tower_folder(place / "run"), torch.device("cpu"), torch.float32)
    assert torch.equal(found["codes"], ours.encode(shown))
    features = ours.quantizer.embed(found["codes"])
    assert torch.allclose(found["reconstruction"], ours.decode_features(features), atol=1e-5)


def test_what_transformers_saves_is_the_same_tower(tmp_path: Path) -> None:
    model = loaded(exported(write_tower(tmp_path / "tower"), tmp_path))
    model.save_pretrained(tmp_path / "saved")
    again, values = loaded(tmp_path / "saved"), torch.randn(3, 3, 32, 32, generator=torch.manual_seed(0))
    assert torch.equal(again.encode(values), model.encode(values))
    codebook = again.to(torch.bfloat16).rqvaesiglip.quantizer.codebooks[0].weight
    assert codebook.dtype == torch.float32


def test_what_is_no_code_is_refused(tmp_path: Path) -> None:
    model = loaded(exported(write_tower(tmp_path / "tower"), tmp_path))
    codes = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    for depth in (0, 5):
        with pytest.raises(ValueError, match=f"depth is {depth}, and 1 to 4 are there"):
            model.decode(codes, depth)
    for wrong in (-1, 64):
        with pytest.raises(ValueError, match=r"codes of depth 3 are not all in 0 .. 63"):
            model.decode(codes.index_fill(3, torch.tensor(2), wrong))


def test_the_processor_turns_pictures_and_scales_gray_ones_as_preprocessing_does(tmp_path: Path) -> None:
    from megatron_eve.models.vila_u.hf.image_processing_vila_u import VILAUImageProcessor

    random = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(random.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(
        tmp_path / "a.jpg", exif=turned
    )
    Image.fromarray(random.integers(0, 65536, (30, 50), dtype=np.uint16)).save(tmp_path / "b.png")
    for name in ("a.jpg", "b.png"):
        values = VILAUImageProcessor(32)([Image.open(tmp_path / name)])["pixel_values"]
        upright = decode_image((tmp_path / name).read_bytes(), apply_exif=True, max_pixels=10**6)
        square = torch.from_numpy(square_of(upright, "stretch", 32))
        assert torch.equal(values[0].permute(1, 2, 0), square.float().div(255).sub(0.5).div(0.5)), name


@pytest.mark.parametrize(
    "name", ["_upright_rgb", "_orientation", "_to_rgb", "_scale", "_gray_to_rgb", "_UPRIGHT"]
)
def test_how_a_picture_is_read_is_written_alike_in_both_exported_processors(name: str) -> None:
    """An exported folder holds all of its code, so there are two copies, which must not drift apart."""
    from megatron_eve.models.eve.hf import image_processing_eve as eve
    from megatron_eve.models.vila_u.hf import image_processing_vila_u as vila_u

    ours, theirs = getattr(vila_u, name), getattr(eve, name)
    assert inspect.getsource(ours) == inspect.getsource(theirs) if callable(ours) else ours == theirs


@pytest.mark.parametrize("fit", FITS)
def test_the_processor_makes_the_pixels_of_tokenize_images(fit: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    folder = exported(write_tower(tmp_path / "tower"), tmp_path)
    loaded(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    random = np.random.default_rng(0)
    shown = [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((40, 90), (77, 50), (32, 32), (300, 200))
    ]
    values = processor(shown, fit=fit)["pixel_values"]
    squares = torch.from_numpy(np.stack([square_of(one, fit, 32) for one in shown]))
    assert torch.equal(values.permute(0, 2, 3, 1), squares.float().div(255).sub(0.5).div(0.5))
    (image,) = processor.postprocess(values[2:3])
    assert np.array_equal(np.asarray(image), np.asarray(shown[2]))
