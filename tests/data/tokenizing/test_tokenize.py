"""Codes of datasets, with toy towers: the same bytes by one process, two and three, also after a kill."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_eve.data.format.code_part import CodePart, open_codes
from megatron_eve.data.format.indexed import DatasetWriter, StoredImage
from megatron_eve.data.format.joined import open_dataset
from megatron_eve.data.format.merging import merge_datasets
from megatron_eve.data.images.squares import square_of
from megatron_eve.data.inspecting.pictures import read_picture
from tests.data.helpers import MINI_SETTINGS, encoded, picture, write_dataset
from tests.data.tokenizing.helpers import FAMILY, write_tower
from tests.families.toy.image_codes import ToyCodes
from tools.tokenize_images import main

ROOT = Path(__file__).parents[3]
PLACEHOLDER = [3, 7, 6]  # the digits of 127 / 256 to base 8


@pytest.fixture(autouse=True)
def threads() -> Any:
    """The command sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def words(folder: Path, data: str, *more: str) -> list[str]:
    flags = ["--family", FAMILY, "--tower", str(folder / "tower"), "--input", data]
    return [*flags, "--micro-batch-size", "4", "--workers", "1", *more]


def make(folder: Path, data: str, *more: str) -> str:
    """Run the command; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(words(folder, data, *more)) == 0
    return out.getvalue()


def expected(data: str, image: int, fit: str = "stretch") -> np.ndarray:
    """Codes of an image by the tower alone."""
    codes = ToyCodes()
    folder = Path(data).parent / "tower"
    pixels = square_of(read_picture(open_dataset(data), image), fit, 32)
    tower = codes.load_tower(codes.read_tower(folder, {}), torch.device("cpu"), torch.float32)
    return tower.encode(torch.from_numpy(pixels)[None])[0].numpy()


def test_the_fit_follows_what_is_to_be_drawn(tmp_path: Path) -> None:
    """By default; what is read keeps all of the picture, and of what is drawn the middle is cut out."""
    write_tower(tmp_path / "tower")
    data = str(tmp_path / "set")
    with DatasetWriter(data, MINI_SETTINGS) as writer:
        for seed, drawn in enumerate((False, True, True)):
            file = encoded(picture(90, 30, seed=seed), "PNG")
            labels = [-100, 5, -200 if drawn else -100, 6]
            writer.add_sample([1, 5, -200, 6], labels, [StoredImage(file, 90, 30, drawn)])
        writer.finalise()
    assert "fit auto" in make(tmp_path, data)
    codes = CodePart(data)
    assert codes.info.fit == "auto"
    for image, fit in enumerate(("stretch", "square", "square")):
        assert (codes.codes(image) == expected(data, image, fit)).all()
        assert (codes.codes(image) != expected(data, image, {"stretch": "square"}.get(fit, "stretch"))).any()
    assert main(words(tmp_path, data, "--fit", "stretch")) == 2  # others are there
    merge_datasets(str(tmp_path / "all"), [data])
    make(tmp_path, str(tmp_path / "all"))
    assert (CodePart(tmp_path / "all").codes(1) == codes.codes(1)).all()


@pytest.mark.parametrize("fit", ["stretch", "square"])
def test_codes_of_a_dataset(tmp_path: Path, fit: str) -> None:
    write_tower(tmp_path / "tower")
    data = write_dataset(tmp_path / "set", 10, 0)
    said = make(tmp_path, data, "--fit", fit)
    assert re.search(r"^made      10 images in [\d.]+ s: [\d,.]+ images/s$", said, re.MULTILINE)
    assert f"{data}_codes.bin: 10 images of 4 x 4 x 3 codes below 8, 96 bytes each\n" in said
    codes = open_codes(open_dataset(data))
    for image in range(10):
        assert (codes.codes(image) == expected(data, image, fit)).all()
    again = make(tmp_path, data, "--fit", fit)
    assert "which were there already: nothing to do" in again and "made" not in again


def test_a_square_is_the_middle_of_a_wide_picture_and_the_top_of_a_tall_one() -> None:
    image = picture(90, 40)
    left = np.asarray(image.crop((25, 0, 65, 40)).resize((16, 16)))
    assert (square_of(image, "square", 16) == left).all()
    tall = image.transpose(Image.Transpose.TRANSPOSE)
    assert (square_of(tall, "square", 16) == np.asarray(tall.crop((0, 0, 40, 40)).resize((16, 16)))).all()
    assert (square_of(image, "stretch", 16) == np.asarray(image.resize((16, 16)))).all()


def test_a_damaged_picture_has_the_codes_of_the_placeholder(tmp_path: Path) -> None:
    write_tower(tmp_path / "tower")
    with DatasetWriter(tmp_path / "set", MINI_SETTINGS) as writer:
        for number in range(6):
            data = encoded(picture(50, 40, seed=number), "JPEG")
            if number in (1, 4):
                data = data[: len(data) // 2] if number == 1 else b"no picture"
            writer.add_sample([1, -200, 5], [-100, -100, 5], [StoredImage(data, 50, 40)])
        writer.finalise()
    data = str(tmp_path / "set")
    said = make(tmp_path, data)
    assert "damaged   2 have the codes of the placeholder image: image 1 of" in said
    assert "image_damaged" in said and "image_format" in said
    part = CodePart(data)
    assert part.info.num_damaged == 2 and len(part.info.damaged_first) == 2
    for image in range(6):
        is_placeholder = (part.codes(image) == PLACEHOLDER).all()
        assert is_placeholder == (image in (1, 4))
        if image not in (1, 4):
            assert (part.codes(image) == expected(data, image)).all()


def test_pictures_that_are_stored_as_pixels_and_merged_datasets(tmp_path: Path) -> None:
    write_tower(tmp_path / "tower")
    settings = replace(MINI_SETTINGS, image_storage="pixels")
    image_settings = {**MINI_SETTINGS.image_settings, "teacher_patch_size": 14}
    from megatron_eve.data.images.interface import DecodeSettings
    from megatron_eve.data.images.storage import ImageStore, StorageSettings

    storage = StorageSettings(
        image_storage="pixels", image_decoder="pillow", family="eve", image_settings=image_settings,
        decode=DecodeSettings(apply_exif=False, max_pixels=1 << 20), jpeg_quality=90, jpeg_subsampling="420",
    )  # fmt: skip
    stored = ImageStore(storage, workers=1).store([encoded(picture(90, 60, seed=n), "PNG") for n in range(3)])
    with DatasetWriter(tmp_path / "pixels", settings, storage.made_with()) as writer:
        for image in stored:
            assert isinstance(image, StoredImage)
            writer.add_sample([1, -200, 5], [-100, -100, 5], [image])
        writer.finalise()
    names = [str(tmp_path / "pixels"), write_dataset(tmp_path / "files", 5, 0)]
    merged = str(tmp_path / "all")
    merge_datasets(merged, names)
    make(tmp_path, merged)
    codes = open_codes(open_dataset(merged))
    assert len(codes) == 8
    for image in range(8):
        data, number = (names[0], image) if image < 3 else (names[1], image - 3)
        assert (codes.codes(image) == expected(data, number)).all()


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "tools/tokenize_images.py", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
    )  # fmt: skip


def kill_after(process: subprocess.Popen[str], folder: Path, chunks: int) -> int:
    """Kill a command when so many chunks are there; how many were there then."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        done = len([path for path in folder.glob("0*.json") if path.name[:5].isdigit()])
        if done >= chunks:
            process.kill()
            process.wait()
            return done
        time.sleep(0.001)
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_one_process_two_and_three_with_kills_give_the_same_bytes(tmp_path: Path) -> None:
    """A slow tower, so that a kill comes in the middle; the workers of a killed command end by themselves."""
    write_tower(tmp_path / "tower", slow=0.02)
    data = write_dataset(tmp_path / "set", 160, 0)
    make(tmp_path, data, "--output-prefix", str(tmp_path / "one"))
    two = words(tmp_path, data, "--output-prefix", str(tmp_path / "two"), "--workers", "2")
    folder = tmp_path / "two_codes.partial"
    first = start(two)
    done = kill_after(first, folder, 5)
    total = CodePart(tmp_path / "one").info.num_images // 4
    assert 5 <= done < total and not (tmp_path / "two_codes.json").exists()
    others = [start(words(tmp_path, data, "--output-prefix", str(tmp_path / "two"))) for _ in range(3)]
    kill_after(others[0], folder, done + 1)
    told = [other.communicate(timeout=200) for other in others]
    assert [other.returncode for other in others] == [-signal.SIGKILL, 0, 0], told
    assert sum("codes below 8" in out for out, _ in told[1:]) >= 1, told
    assert (tmp_path / "two_codes.bin").read_bytes() == (tmp_path / "one_codes.bin").read_bytes()
    assert CodePart(tmp_path / "two").info == CodePart(tmp_path / "one").info
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_process_raises_is_one_sentence(tmp_path: Path) -> None:
    write_tower(tmp_path / "tower", broken=True)
    data = write_dataset(tmp_path / "set", 20, 0)
    process = start(words(tmp_path, data, "--workers", "2"))
    _, told = process.communicate(timeout=200)
    assert process.returncode == 2, told
    assert re.findall(r"^error: (.*)$", told, re.MULTILINE) == ["the weights are damaged"]
    assert "Traceback" not in told


def test_other_codes_are_refused_without_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tower(tmp_path / "tower")
    data = write_dataset(tmp_path / "set", 5, 0)
    make(tmp_path, data)
    assert main(words(tmp_path, data, "--fit", "square")) == 2
    told = capsys.readouterr().err
    assert (
        "set_codes.json is there already, made with --fit stretch, and this command has square: add" in told
    )
    make(tmp_path, data, "--fit", "square", "--overwrite")
    assert CodePart(data).info.fit == "square"
    path = tmp_path / "set_codes.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert main(words(tmp_path, data, "--fit", "square")) == 2
    assert "set_codes.bin is truncated" in capsys.readouterr().err
    make(tmp_path, data, "--fit", "square", "--overwrite")
    write_dataset(tmp_path / "set", 5, 1)
    assert main(words(tmp_path, data, "--fit", "square")) == 2
    assert "made of another dataset, or that was changed since: add --overwrite" in capsys.readouterr().err
