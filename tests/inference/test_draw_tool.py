"""tools/draw.py: files of pictures and videos, the same under any layout, and whole ones alone after a kill."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_eve.inference.drawn_pictures import DrawnPictures, Place
from tests.inference.vila_u_model import Model, write_model
from tests.ranks import RankPool
from tests.test_commands import ROOT

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint, which names the tower of its codes."""
    return write_model(tmp_path_factory.mktemp("model"), ranks)


def command(model: Model, *words: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = [sys.executable, "-W", "ignore", *(torchrun if ranks > 1 else [])]
    return [*start, str(ROOT / "tools" / "draw.py"), *model.flags, *words]


def draw(model: Model, *words: str, ranks: int = 1, status: int = 0) -> str:
    found = subprocess.run(command(model, *words, ranks=ranks), capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == status, found.stderr
    return found.stdout + found.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_pictures_are_the_same_under_any_layout_and_after_a_kill(model: Model, tmp_path: Path) -> None:
    words = ["--prompt", "A red car.", "Two dogs.", "--num-images", "3", "--batch-size", "1"]
    output = draw(model, *words, "--output-dir", str(tmp_path / "one"))
    assert "drawn     6, and 0 that were there" in output
    codes = np.load(tmp_path / "one" / "00001_02.npy")
    assert codes.shape == (4, 4, 4) and codes.dtype == np.int64 and 0 <= codes.min() <= codes.max() < 64
    with Image.open(tmp_path / "one" / "00001_02.png") as picture:
        assert picture.size == (32, 32)
    layout = ["--tensor-model-parallel-size", "2"]
    draw(model, *words, *layout, "--batch-size", "4", "--output-dir", str(tmp_path / "two"), ranks=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    killed = tmp_path / "killed"
    with subprocess.Popen(
        command(model, *words, "--output-dir", str(killed)), stderr=subprocess.DEVNULL
    ) as run:
        while not any(killed.glob("*.npy")) and run.poll() is None:
            time.sleep(0.005)
        run.kill()
    there = {path.stem for path in killed.glob("*.npy")}
    assert there and not (killed / "sheet.png").exists()
    for name, content in contents(killed).items():
        if name[:8] in there and not name.endswith(".partial"):
            assert content == (tmp_path / "one" / name).read_bytes()
    assert f"and {len(there)} that were there" in draw(model, *words, "--output-dir", str(killed))
    assert all(contents(killed)[name] == content for name, content in contents(tmp_path / "one").items())


def test_a_video_is_eight_pictures(model: Model, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Waves.\n\n")
    words = ["--prompt-file", str(tmp_path / "prompts.txt"), "--video", "--temperature", "0", "--cfg", "2"]
    draw(model, *words, "--output-dir", str(tmp_path / "out"))
    names = {f"00000_00_{frame}.png" for frame in range(8)} | {"00000_00.npy", "drawing.json", "sheet.png"}
    assert set(contents(tmp_path / "out")) == names
    assert np.load(tmp_path / "out" / "00000_00.npy").shape == (8, 4, 4, 4)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--cfg", "-1"], "--cfg -1: must be 0 or more"),
        (["--top-k", "65"], "--top-k 65: the codebook has 64 codes; 0 takes all of them"),
        (["--prompt", "word " * 2000], "positions in front of 1 x 4 x 4 of a picture; shorten it"),
        (["--prompt", " "], "--prompt: no text in it; say what to draw"),
        (["--prompt", "a <image> car"], "prompt 0: holds <image>, which stands for a picture"),
        (["--tower", "/nowhere"], "--tower: "),
        (["--temperature", "0", "--seed", "5"], "--seed: has no effect with --temperature 0"),
        (
            ["--temperature", "0", "--num-images", "2"],
            "--num-images 2: all pictures of a prompt are the same",
        ),
        (
            ["--conv-mode", "plain"],
            "--conv-mode plain: template 'plain' draws no pictures; name one that does",
        ),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(
    model: Model, tmp_path: Path, words: list[str], says: str
) -> None:
    found = draw(model, "--prompt", "x", *words, "--output-dir", str(tmp_path / "out"), status=2)
    assert found.startswith("error: ") and says in found and found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_pictures_is_refused(tmp_path: Path) -> None:
    picture = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    first = DrawnPictures(tmp_path, ["a", "b"], {"--cfg": 3.0}, 1)
    first.write(Place(1, 0), np.zeros((1, 2, 2, 4), dtype=np.int64), picture)
    assert DrawnPictures(tmp_path, ["a"], {"--cfg": 3.0}, 1).is_whole(Place(1, 0))
    assert not DrawnPictures(tmp_path, ["a", "b", "c"], {"--cfg": 3.0}, 1).is_whole(Place(2, 0))
    for prompts, cfg, says in (
        (["b"], 3.0, "its prompt 0 is 'a', and this command's 'b'"),
        (["a"], 2.0, "--cfg 3"),
    ):
        with pytest.raises(Exception, match=says):
            DrawnPictures(tmp_path, prompts, {"--cfg": cfg}, 1)
    with pytest.raises(Exception, match="drawn with --seed left out, and this command has 0"):
        DrawnPictures(tmp_path, ["a"], {"--cfg": 3.0, "--seed": 0}, 1)
    with pytest.raises(Exception, match=r"drawn with --cfg 3\.0, and this command has left out"):
        DrawnPictures(tmp_path, ["a"], {}, 1)
    with pytest.raises(Exception, match=r"--output-dir .*: cannot be made"):
        DrawnPictures(tmp_path / "drawing.json", ["a"], {}, 1)


def test_the_sheet_has_the_first_pictures_of_many(tmp_path: Path) -> None:
    """Of more than 64 prompts, and more than 64 pictures of one; a file that is none of these is passed over."""
    many = DrawnPictures(tmp_path, ["a"] * 100_002, {}, 1)
    picture, codes = np.zeros((1, 8, 8, 3), dtype=np.uint8), np.zeros((1, 1, 1, 1), dtype=np.int64)
    for place in [Place(100_001, 0), *(Place(0, number) for number in range(150))]:
        many.write(place, codes, picture)
    np.save(tmp_path / "my_features.npy", codes)
    with Image.open(many.write_sheet()) as sheet:
        assert sheet.width <= 6000 and sheet.height < 300
    for prompt in range(1, 70):
        many.write(Place(prompt, 0), codes, picture)
    with Image.open(many.write_sheet()) as sheet:
        assert sheet.height == 64 * (22 + 85 + 8) + 8
