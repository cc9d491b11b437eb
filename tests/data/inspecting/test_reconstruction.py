"""tools/reconstruct.py: pictures of codes at each depth, their PSNR, and the sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.data.inspecting.reconstruction import draw_sheet, peak_signal_to_noise, reconstruct
from tests.data.helpers import picture
from tests.data.tokenizing.helpers import FAMILY, write_tower
from tests.families.toy.image_codes import ToyCodes
from tools.reconstruct import main


def test_psnr() -> None:
    picture = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert peak_signal_to_noise(picture, picture) == float("inf")
    assert peak_signal_to_noise(picture, picture + 1) == pytest.approx(48.1308, abs=1e-4)
    assert peak_signal_to_noise(picture, np.zeros_like(picture)) == pytest.approx(8.1308, abs=1e-4)


def test_each_depth_is_nearer_to_the_picture(tmp_path: Path) -> None:
    """A picture that is one colour in each patch, of which three digits say all."""
    codes = ToyCodes()
    tower = codes.read_tower(write_tower(tmp_path / "tower"), {})
    model = codes.load_tower(tower, torch.device("cpu"), torch.float32)
    gray = np.random.default_rng(0).integers(0, 256, (4, 4), dtype=np.uint8)
    square = np.repeat(gray.repeat(8, 0).repeat(8, 1)[..., None], 3, axis=-1)
    found = reconstruct(model, "gray.png", square, torch.device("cpu"))
    assert len(found.pictures) == 3 and all(one.shape == (32, 32, 3) for one in found.pictures)
    assert found.psnr[0] < 35 < found.psnr[1] < 55 < found.psnr[2] == float("inf")
    sheet = np.asarray(draw_sheet([found, found]))
    # Four columns of 96 pixels, each pixel of the picture three wide, below two lines of text.
    assert sheet.shape == (22 + 2 * (22 + 96 + 22) + 8, 8 + 4 * 104, 3)
    for column, pixels in enumerate((square, *found.pictures)):
        left = 8 + column * 104
        for top in (44, 44 + 140):
            cell = sheet[top : top + 96, left : left + 96]
            assert (cell == pixels.repeat(3, 0).repeat(3, 1)).all()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tower(tmp_path / "tower", depth=2)
    names = []
    for name, size in (("wide.png", (90, 40)), ("tall.jpg", (30, 80))):
        picture(*size).save(tmp_path / name)
        names.append(str(tmp_path / name))
    flags = ["--family", FAMILY, "--tower", str(tmp_path / "tower"), "--fit", "square"]
    assert main([*flags, "--input", *names, "--output", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["PSNR", "wide.png", "tall.jpg", "mean", "sheet"]
    figures = np.array([[float(word) for word in line.split()[1:]] for line in lines[1:4]])
    assert figures.shape == (3, 2) and (figures > 5).all()
    assert figures[2] == pytest.approx(figures[:2].mean(axis=0), abs=0.01)
    assert Image.open(tmp_path / "sheet.png").size == (8 + 3 * 104, 22 + 2 * 140 + 8)
