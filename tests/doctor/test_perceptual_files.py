"""The doctor on the files of the perceptual loss that it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_eve.doctor.perceptual_files import perceptual_files
from megatron_eve.models.towers.perceptual import PerceptualLoss
from tools import doctor


def test_files_of_use_and_of_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = PerceptualLoss().shapes()
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    weights, linear, other = (tmp_path / f"{name}.safetensors" for name in ("vgg16", "maps", "other"))
    save_file({name: tensor for name, tensor in tensors.items() if "lin" not in name}, weights)
    save_file({name: tensor for name, tensor in tensors.items() if "lin" in name}, linear)
    save_file({"features.0.weight": torch.zeros(64, 3, 7, 7)}, other)
    assert perceptual_files(weights, linear) == (
        ("perceptual loss", f"a VGG-16 and its five maps in {weights} and {linear}"),
        None,
    )
    assert "holds no lin0.model.1.weight" in str(perceptual_files(weights, None)[1])
    monkeypatch.setattr("sys.argv", ["doctor.py", "--perceptual-weights", str(other)])
    assert doctor.main() == 1
    report = capsys.readouterr().out
    assert f" perceptual loss {other} of no use " in " ".join(report.split())  # a long path breaks the line
    told = " ".join(report.split("\nproblems\n")[1].split())
    assert (
        f"--perceptual-weights {other}: features.0.weight is [64, 3, 7, 7], and [64, 3, 3, 3] in VGG-16"
        in told
    )
    assert "remedy: the files, and where they come from, are in docs/vila_u.md" in told
