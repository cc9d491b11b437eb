"""Runs on stored pixels: the losses of the files they were made of, and no resume on other storage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError, check_data
from megatron_eve.config import RunConfig
from megatron_eve.data.format.indexed import IndexedVisionDataset
from tests.data.format.test_format_versions import write_as_pixels
from tests.data.helpers import write_dataset


def losses(prefix: str, save: Path) -> list[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
        "-m", "megatron_eve.pretrain", "--preset", "eve_mini", "--global-batch-size", "4", "--seq-length", "384",
        "--train-iters", "4", "--lr", "4e-5", "--image-decoder", "pillow", "--data-path", prefix, "--save", str(save),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line)["lm_loss_hex"] for line in (save / "losses.jsonl").read_text().splitlines()]


@pytest.mark.distributed
@pytest.mark.slow
def test_pixels_give_the_losses_of_their_files(tmp_path: Path) -> None:
    files = IndexedVisionDataset(write_dataset(tmp_path / "files", 16, seed=1))
    pixels = write_as_pixels(tmp_path / "pixels", files)
    expected = losses(files.prefix, tmp_path / "a")
    assert len(expected) == 4 and losses(pixels, tmp_path / "b") == expected


def test_a_resume_on_other_storage_is_refused() -> None:
    config = RunConfig()
    fingerprint = {"samples": [3], "image storage": ["encoded"], "content": ["aa"]}
    saved = {"config": config.to_dict(), "dataset": fingerprint}
    other = {**fingerprint, "image storage": ["pixels"], "content": ["bb"]}
    with pytest.raises(
        CheckpointError, match=r"image storage are \['encoded'\], this run's are \['pixels'\]"
    ):
        check_data(Path("run"), saved, config, other)
