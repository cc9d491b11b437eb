"""Codes of datasets by VILA-U's towers: the golden ones, and those of the tower alone, however they are made."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from megatron_eve.data.format.code_part import CodePart
from megatron_eve.data.format.indexed import DatasetWriter, StoredImage
from megatron_eve.data.images.squares import square_of
from megatron_eve.models.vila_u.image_codes import IMAGE_CODES
from megatron_eve.models.vila_u.tower import load_tower
from megatron_eve.models.vila_u.tower_folder import read_tower_folder
from tests.data.helpers import MINI_SETTINGS, encoded, picture
from tests.golden_dir import find_golden
from tests.models.vila_u.towers import write_tower
from tools.tokenize_images import main


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The command sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_pictures(prefix: Path, pictures: list[Image.Image]) -> str:
    """A dataset of PNG files, one a sample."""
    with DatasetWriter(prefix, MINI_SETTINGS) as writer:
        for image in pictures:
            stored = StoredImage(encoded(image, "PNG"), *image.size)
            writer.add_sample([1, -200, 5], [-100, -100, 5], [stored])
        writer.finalise()
    return str(prefix)


def test_golden_codes(tmp_path: Path) -> None:
    """All pictures of the golden training batches, whose codes the published tower made in other batches."""
    folder = find_golden("vila/vilau_llm_train")
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    pictures, codes = [], []
    for batch in ("mixed", "understanding", "t2i_pair"):
        pixels = np.rint((inputs[f"{batch}.images"] * 0.5 + 0.5) * 255).astype(np.uint8)
        pictures += [Image.fromarray(one) for one in pixels.transpose(0, 2, 3, 1)]
        codes += [*outputs[f"{batch}.image_codes_plus_vocab"].reshape(-1, 4, 4, 4) - 480]
    assert len(pictures) == len(codes) == 21
    data = write_pictures(tmp_path / "set", pictures)
    tower = str(find_golden("vila/vilau_model"))
    assert main(["--tower", tower, "--input", data, "--micro-batch-size", "4", "--workers", "1"]) == 0
    part = CodePart(data)
    assert (part.info.codebook_size, part.info.image_bytes) == (1024, 128)
    assert all((part.codes(number) == wanted).all() for number, wanted in enumerate(codes))


def test_the_published_square_of_pictures_to_draw() -> None:
    folder = find_golden("vila/vilau_data")
    wanted = load_file(folder / "outputs.safetensors")
    with tarfile.open(folder / "data" / "t2i" / "00000.tar") as archive:
        for number, name in enumerate(("000000.jpg", "000001.jpg")):  # a tall one, a wide one
            file = archive.extractfile(name)
            assert file is not None
            square = square_of(Image.open(io.BytesIO(file.read())).convert("RGB"), "square", 64)
            golden = (wanted[f"t2i_{number}.image"][0] * 0.5 + 0.5) * 255
            assert abs(square.transpose(2, 0, 1) - golden).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_codes_do_not_depend_on_the_processes(tmp_path: Path, dtype: str) -> None:
    write_tower(tmp_path / "tower")
    data = write_pictures(tmp_path / "set", [picture(40 + number, 50, seed=number) for number in range(11)])
    made = []
    for workers in ("1", "2"):
        output = str(tmp_path / f"by_{workers}")
        flags = [
            "--tower",
            str(tmp_path / "tower"),
            "--input",
            data,
            "--output-prefix",
            output,
            "--dtype",
            dtype,
        ]
        assert main([*flags, "--micro-batch-size", "3", "--workers", workers]) == 0
        made.append(CodePart(output))
    assert made[0].info == made[1].info
    assert made[0].info.tower_sha256 == IMAGE_CODES.sha256(read_tower_folder(tmp_path / "tower"))
    tower = load_tower(read_tower_folder(tmp_path / "tower"), torch.device("cpu"), getattr(torch, dtype))
    squares = [square_of(picture(40 + number, 50, seed=number), "stretch", 32) for number in range(3)]
    alone = tower.encode(torch.from_numpy(np.stack(squares))).numpy()
    assert all((made[0].codes(number) == alone[number]).all() for number in range(3))
