"""The command: flags, summary, exit status."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig
from megatron_eve.data.preprocessing.summary import format_summary
from megatron_eve.models.registry import find_family
from tests.data.helpers import (
    ROOT,
    MakeConfig,
    caption_row,
    opened,
    skipped_rows,
    text_row,
)


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preprocess_data", ROOT / "tools" / "preprocess_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags(config: PreprocessConfig, *more: str) -> list[str]:
    given = ["--input", config.input, "--image-root", config.image_root, "--workers", str(config.workers)]
    given += ["--tokenizer-model", config.tokenizer_model, "--output-prefix", config.output_prefix]
    return [*given, *more]


def test_the_command_from_a_shell(make_config: MakeConfig) -> None:
    rows = [caption_row(n, ("ok.jpg", "no.jpg")[n % 2]) for n in range(14)]
    config = make_config(rows, workers=2)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    info = opened(config).info
    assert done.stdout.startswith(format_summary(info, config.output_prefix) + "\n")
    for line in (
        "rows read         14",
        "rows kept         7 (0 cut at 2,048 tokens)",
        "images            7",
        f"tokens that train {info.num_labels:,}",
        "rows skipped      7 (50.0%)",
        "         7  image_missing: no such file under --image-root\n            to do: check that --image-root is",
        "              row 2 of data.json, id id1, image no.jpg: no.jpg",
    ):
        assert line in done.stdout, done.stdout
    assert done.stdout.count("image no.jpg") == 2  # the first ones; the file has them all
    assert len(info.skipped_first["image_missing"]) == 5
    *_, time, look, train = done.stdout.splitlines()
    assert re.fullmatch(r"time              [0-9.]+ s \([0-9,]+ rows/s\)", time)
    assert f"python tools/inspect_data.py {config.output_prefix} --tokenizer-model " in look
    assert f"--data-path {config.output_prefix} --tokenizer-model {config.tokenizer_model}" in train
    assert len(skipped_rows(config)) == 7
    assert "100%" in done.stderr
    assert "Warning" not in done.stderr


def test_flags_reach_the_dataset(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config([text_row()])
    more = ["--template", "vicuna_v1", "--image-size", "1344", "--model-max-length", "4096"]
    more += ["--ignore-exif-orientation", "--max-image-pixels", "12345"]
    assert load_tool().main(flags(config, *more)) == 0
    info = opened(config).info
    assert (info.template, info.model_max_length) == ("vicuna_v1", 4096)
    assert (info.family, info.image_settings) == ("eve", {"image_size": 1344, "teacher_size": 336})
    assert (info.apply_exif, info.max_pixels) == (False, 12345)
    assert "rows kept         1" in capsys.readouterr().out


def test_the_command_fails_in_words(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config([caption_row(1, "no.jpg")])
    assert load_tool().main(flags(config)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: no row of" in captured.err
    assert "image no.jpg" in captured.err
    assert "Traceback" not in captured.err
    assert load_tool().main([*flags(config), "--image-size", "100"]) == 2
    assert "--image-size" in capsys.readouterr().err


def test_a_stop_is_told_and_leaves_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config([caption_row(1, "ok.jpg")])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DatasetWriter, "add_block", stop)
    assert load_tool().main(flags(config)) == 130
    assert "stopped" in capsys.readouterr().err
    assert list(Path(config.output_prefix).parent.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("pictures", "workers"), [(True, 1), (True, 2), (False, 2)], ids=["pictures", "in workers", "text"]
)
def test_a_full_disk_is_told_and_leaves_nothing(
    make_config: MakeConfig,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    pictures: bool,
    workers: int,
) -> None:
    rows: list[object] = [
        caption_row(n, "ok.jpg") if pictures else text_row(answer="word " * 100) for n in range(300)
    ]
    template = "plain" if pictures else "vicuna_v1"
    config = make_config(rows, output_prefix=str(small_disk / "set"), workers=workers, template=template)
    assert load_tool().main(flags(config, "--template", template)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        f"error: No space left on device in {small_disk}: no dataset was written; make room"
    )
    assert list(small_disk.iterdir()) == []


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_tool().main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = {*PreprocessConfig.__dataclass_fields__, *find_family("eve").image_flags} - {"image_settings"}
    for name in names:
        flag = {"apply_exif": "ignore-exif-orientation"}.get(name, name.replace("_", "-"))
        assert f"--{flag}" in text.split("\n\n", 1)[1]  # below the usage line, with its explanation
    assert "default: 2048" in " ".join(text.split())
