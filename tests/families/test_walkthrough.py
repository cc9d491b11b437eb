"""docs/adding_a_model_family.md: the code that it quotes is in the files, and its commands run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "adding_a_model_family.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^`([\w./]+)`\n\n```\w*\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```(?:bash|console)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_block_of_code_is_in_the_file_above_it() -> None:
    assert len(QUOTES) == len(re.findall(r"^```text$", PAGE, re.MULTILINE)) > 10
    for name, code in QUOTES:
        assert code in (ROOT / name).read_text(encoding="utf-8"), f"{name} does not hold:\n{code}"


def test_every_file_of_the_toy_is_in_the_table() -> None:
    files = {path.name for path in Path(__file__).with_name("toy").glob("*.py")} - {"__init__.py"}
    assert files == set(re.findall(r"^\| `tests/families/toy/(\w+\.py)`", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    ("command", "said"), [*zip(COMMANDS, ("colour loss", "captions_dataset.json"), strict=True)]
)
def test_the_commands_run(command: str, said: str, tmp_path: Path) -> None:
    assert said in output_of(["bash", "-euc", command], tmp_path)


def output_of(command: list[str], folder: Path) -> str:
    """What a command printed, started in the repository's root, with `python` on the PATH."""
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_targets_that_a_dataset_stores(tmp_path: Path) -> None:
    """The colours that the loss trains towards, read from the dataset, are those of the pictures."""
    for name, size in (("red", (96, 64)), ("blue", (50, 70))):
        gradient = Image.radial_gradient("L").resize(size)
        Image.merge("RGB", (gradient, Image.new("L", size, 20), Image.new("L", size, len(name) * 40))).save(
            tmp_path / f"{name}.png"
        )
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a picture"}]
    rows = [
        {"id": name, "image": f"{name}.png", "conversations": turns}
        for name in ("red", "blue", "red", "blue")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    family = ["--family", "tests.families.toy.family", "--image-decoder", "pillow"]
    losses = {}
    for storage in ("encoded", "pixels"):
        prefix, run = tmp_path / storage, tmp_path / f"run_{storage}"
        command = ["python", "tools/preprocess_data.py", *family, "--input", f"{tmp_path}/rows.json"]
        command += [
            "--image-root",
            str(tmp_path),
            "--tokenizer-model",
            "tests/golden/tokenize/tokenizer.model",
        ]
        output_of(
            [*command, "--output-prefix", str(prefix), "--image-storage", storage, "--workers", "1"], tmp_path
        )
        command = [
            "python",
            "-m",
            "megatron_eve.pretrain",
            *family,
            "--preset",
            "toy_tiny",
            "--save",
            str(run),
        ]
        command += ["--data-path", str(prefix), "--seq-length", "512", "--global-batch-size", "2"]
        output_of([*command, "--train-iters", "4", "--lr", "1e-3"], tmp_path)
        lines = (run / "losses.jsonl").read_text().splitlines()
        losses[storage] = [json.loads(line)["colour_loss_hex"] for line in lines]
    assert not (tmp_path / "pixels_image.bin").exists()  # no picture to decode
    assert losses["pixels"] == losses["encoded"] and len(set(losses["pixels"])) > 2
