"""A checkpoint records which tokenizer its text was made with, and where that was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.checkpoint.compatibility import CheckpointError
from megatron_eve.checkpoint.state import saved_common
from megatron_eve.checkpoint.tokenizer_record import (
    TokenizerRecord,
    open_tokenizer,
    recorded_tokenizer,
    tokenizer_of_folder,
    tokenizer_of_run,
)
from megatron_eve.config import CheckpointConfig, ConfigError, DataConfig, RunConfig
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.preflight import check_run
from tests.data.helpers import write_dataset
from tests.families.eve import run_config
from tests.families.suite import run, saving_in
from tests.golden_dir import find_golden
from tests.hf.test_export import spoilt_tokenizer
from tests.layouts import ONE
from tests.ranks import RankPool


@pytest.fixture
def right(tmp_path: Path) -> Tokenizer:
    return Tokenizer(shutil.copyfile(find_golden("tokenize") / "tokenizer.model", tmp_path / "right.model"))


@pytest.fixture
def other(tmp_path: Path) -> Tokenizer:
    """Another one of just as many pieces."""
    return Tokenizer(spoilt_tokenizer(tmp_path / "other") / "tokenizer.model")


def write_run(folder: Path, **saved: Any) -> Path:
    """A folder of a run with what is read of a checkpoint beside its tensors; returns the checkpoint's."""
    checkpoint = folder / "iter_0000002"
    checkpoint.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    torch.save({"config": RunConfig().to_dict(), "dataset": {}, **saved}, checkpoint / "common.pt")
    return checkpoint


def test_checkpoints_of_older_versions_say_it_elsewhere(right: Tokenizer) -> None:
    for saved in ({"dataset": {"tokenizer_sha256": right.sha256}}, {"tokenizer_sha256": right.sha256}):
        found = recorded_tokenizer(saved)
        assert found is not None and found.is_same(TokenizerRecord.of(right)) and found.path is None
    assert recorded_tokenizer({"dataset": {"tokenizer_sha256": "mock"}}) is None
    assert recorded_tokenizer({"dataset": None, "tokenizer": None}) is None


def test_a_recorded_tokenizer_that_is_still_there_needs_no_flag(
    tmp_path: Path, right: Tokenizer, other: Tokenizer
) -> None:
    checkpoint = write_run(tmp_path / "run", tokenizer=TokenizerRecord.of(right).to_dict())
    found, warning = open_tokenizer(checkpoint, None)
    assert (found.path, warning) == (right.path, None)
    for given in (Path(right.path), find_golden("tokenize")):
        assert open_tokenizer(checkpoint, given)[0].sha256 == right.sha256
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(checkpoint, Path(other.path))
    assert f"{other.path}: is another tokenizer" in str(caught.value) and right.path in str(caught.value)
    shutil.copyfile(other.path, right.path)
    with pytest.raises(ConfigError, match=r"right\.model, which .* was trained with, is another one now"):
        open_tokenizer(checkpoint, None)
    Path(right.path).unlink()
    with pytest.raises(ConfigError, match="is not there any more; name a copy of it"):
        open_tokenizer(checkpoint, None)
    silent = write_run(tmp_path / "silent")
    with pytest.raises(ConfigError, match=r"does not hold its tokenizer; name the tokenizer\.model that"):
        open_tokenizer(silent, None)


def test_a_run_records_that_of_its_data_and_inherits_its_place(
    tmp_path: Path, right: Tokenizer, other: Tokenizer
) -> None:
    write_run(tmp_path / "start", tokenizer=TokenizerRecord.of(right).to_dict())
    started = RunConfig(checkpoint=CheckpointConfig(pretrained_checkpoint=str(tmp_path / "start")))
    mine, theirs = TokenizerRecord.of(right), TokenizerRecord.of(other)
    of_data = {"tokenizer_sha256": right.sha256}
    assert tokenizer_of_run(started, of_data) == mine
    assert tokenizer_of_run(started, {"tokenizer_sha256": "mock"}) == mine
    assert tokenizer_of_run(started, {"tokenizer_sha256": other.sha256}) == replace(theirs, path=None)
    assert tokenizer_of_run(RunConfig(), of_data) == replace(mine, path=None)
    assert tokenizer_of_run(RunConfig(), {"tokenizer_sha256": "mock"}) is None
    flag = RunConfig(data=DataConfig(tokenizer_model=right.path))
    assert tokenizer_of_run(flag, of_data) == mine
    assert tokenizer_of_run(flag, {"tokenizer_sha256": other.sha256}) == replace(theirs, path=None)


def test_weights_of_another_tokenizer_than_the_data_are_refused(
    tmp_path: Path, right: Tokenizer, other: Tokenizer
) -> None:
    """Of a run, and of a folder in Hugging Face layout with a tokenizer.model in it."""
    data = write_dataset(tmp_path / "set", 8, 0, tokenizer_sha256=right.sha256)
    published = Path(shutil.copytree(find_golden("_shared/hf_mini224"), tmp_path / "published"))
    config = run_config(ONE.parallel, iterations=2)
    for tokenizer, refused in ((right, False), (other, True)):
        start = write_run(
            tmp_path / f"start{refused}", tokenizer=TokenizerRecord.of(tokenizer).to_dict()
        ).parent
        shutil.copyfile(tokenizer.path, published / "tokenizer.model")
        for folder in (start, published):
            one = replace(
                config,
                data=replace(config.data, mock_data=False, data_path=(data,)),
                checkpoint=CheckpointConfig(pretrained_checkpoint=str(folder)),
            )
            if not refused:
                check_run(one, 1)
                continue
            with pytest.raises(ConfigError) as caught:
                check_run(one, 1)
            assert f"--pretrained-checkpoint {folder}: was trained with the tokenizer /" in str(caught.value)
            assert right.sha256[:12] in str(caught.value) and other.sha256[:12] in str(caught.value)


@pytest.mark.distributed
def test_a_checkpoint_of_a_run_holds_it(ranks: RankPool, tmp_path: Path, right: Tokenizer) -> None:
    data = write_dataset(tmp_path / "set", 8, 0, tokenizer_sha256=right.sha256)
    config = run_config(ONE.parallel, iterations=1)
    config = replace(
        config,
        data=replace(config.data, mock_data=False, data_path=(data,), tokenizer_model=right.path),
    )
    ranks.run(1, run, saving_in(config, tmp_path / "run"), 1, True)
    _, saved = saved_common(str(tmp_path / "run"))
    assert saved["tokenizer"] == {"kind": "sentencepiece", "sha256": right.sha256, "path": right.path}
    assert tokenizer_of_folder(tmp_path / "run") == TokenizerRecord.of(right)
