"""A dataset that is there is refused before any work, or replaced (--overwrite) once the new one is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.data.errors import DataError
from megatron_eve.data.format import indexed_writer
from megatron_eve.data.format.indexed_writer import DatasetWriter
from megatron_eve.data.format.manifest import MANIFEST, PARTIAL, TEXT_PARTS, read_info
from megatron_eve.data.format.output import check_output
from tests.data.helpers import MINI_SETTINGS, ROOT, MakeConfig, caption_row, opened, run, text_row

REMEDY = "add --overwrite to replace it, or choose another --output-prefix"


def files(prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(prefix).parent.iterdir()}


def test_a_dataset_is_refused_and_stays_as_it_is(make_config: MakeConfig) -> None:
    config = make_config([caption_row(1, "ok.jpg"), caption_row(2, "ok.jpg")])
    run(config)
    os.utime(config.output_prefix + MANIFEST, (1_700_000_000, 1_700_000_000))
    before = files(config.output_prefix)
    with pytest.raises(DataError) as error:
        run(replace(config, tokenizer_model="nowhere"))  # nothing else was looked at
    assert str(error.value) == (
        f"{config.output_prefix} is a dataset already (made 2023-11-14, 2 samples): {REMEDY}"
    )
    assert files(config.output_prefix) == before
    Path(config.output_prefix + MANIFEST).write_text("{")
    with pytest.raises(DataError, match="its manifest cannot be read"):
        run(config)
    Path(config.output_prefix + MANIFEST).unlink()
    with pytest.raises(
        DataError, match=r"set_text.bin is there already, a file of a dataset without its set_dataset"
    ):
        run(config)
    assert run(replace(config, overwrite=True)).num_samples == 2


def test_pictures_of_the_old_dataset_go_with_it(make_config: MakeConfig) -> None:
    config = make_config([caption_row(1, "ok.jpg")])
    run(config)
    again = make_config([text_row()], template="vicuna_v1", overwrite=True)
    run(again)
    names = {name.removeprefix("set") for name in files(config.output_prefix)}
    assert names == {*TEXT_PARTS, "_text.idx", "_meta.parquet", "_skipped.jsonl", MANIFEST}
    assert opened(again).info.num_images == 0


def test_the_old_dataset_opens_until_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, old = str(tmp_path / "set"), []
    sync = indexed_writer.sync

    def sync_and_look(path: str) -> None:
        sync(path)
        old.append(read_info(prefix).num_samples)

    monkeypatch.setattr(
        indexed_writer,
        "read_info",
        __import__("megatron_eve.data.format.manifest", fromlist=["x"]).read_info,
        raising=False,
    )
    for samples in (1, 2):
        with DatasetWriter(prefix, MINI_SETTINGS) as writer:
            for _ in range(samples):
                writer.add_sample([1, 5, 6], [-100, 5, 6], [])
            writer.finalise()
            monkeypatch.setattr(indexed_writer, "sync", sync_and_look)
    assert old == [1] * 4


# Is killed at its n-th renaming of a file.
KILLED = """
import os, signal, sys
from megatron_eve.data.preprocessing.preprocess import PreprocessConfig, preprocess
names = ("input", "image_root", "tokenizer_model", "output_prefix")
config = PreprocessConfig(**dict(zip(names, sys.argv[1:], strict=False)), overwrite=sys.argv[6] == "True")
real, left = os.replace, [int(sys.argv[5])]
def replace(*names):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(*names)
os.replace = replace
preprocess(config, progress=False)
"""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("renamed", [0, 2, 8])
def test_what_a_killed_run_leaves_is_no_dataset(
    make_config: MakeConfig, overwrite: bool, renamed: int
) -> None:
    config = make_config([caption_row(1, "ok.jpg")], overwrite=overwrite)
    if overwrite:
        run(config)
    words = [config.input, config.image_root, config.tokenizer_model, config.output_prefix]
    command = [sys.executable, "-c", KILLED, *words, str(renamed), str(overwrite)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -9
    assert Path(config.output_prefix + MANIFEST + PARTIAL).exists()
    if overwrite and renamed == 0:  # the first is the list of skipped rows, before the old dataset goes
        assert len(opened(config)) == 1
        with pytest.raises(DataError, match="is a dataset already"):
            run(replace(config, overwrite=False))
        run(config)
    else:
        assert not Path(config.output_prefix + MANIFEST).exists()
        run(replace(config, overwrite=False))
    assert len(opened(config)) == 1
    assert not list(Path(config.output_prefix).parent.glob(f"*{PARTIAL}"))


@pytest.mark.parametrize("prefix", ["{0}/", "{0}/.", "{0}/..", "{0}/file/set", "{0}/file/below/set"])
def test_prefixes_that_no_dataset_can_have(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"--output-prefix .*(add a name for the dataset|/file is a file; choose)"
    ):
        check_output(prefix.format(tmp_path), overwrite=True)
    check_output(str(tmp_path / "new" / "below" / "set"), overwrite=False)
