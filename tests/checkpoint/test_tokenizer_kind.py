"""A checkpoint's tokenizer is read again as it was for the text that the model was trained on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eve.checkpoint.tokenizer_record import (
    TokenizerRecord,
    open_tokenizer,
    recorded_tokenizer,
    tokenizer_of_run,
)
from megatron_eve.config import CheckpointConfig, ConfigError, DataConfig, RunConfig
from megatron_eve.convert.folders import source_tokenizer
from megatron_eve.data.text.load_tokenizer import load_kind, load_tokenizer
from megatron_eve.data.text.text_tokenizer import SENTENCEPIECE, SENTENCEPIECE_NOT_LEGACY, TOKENIZERS
from megatron_eve.inference.opening import chat_template
from megatron_eve.preflight import check_run
from tests.data.helpers import write_dataset
from tests.families.eve import run_config
from tests.golden_dir import find_golden
from tests.layouts import ONE
from tests.test_mistakes import write_run


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """A tokenizer's file of each kind."""
    model = shutil.copyfile(find_golden("tokenize") / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "qwen2").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(
            find_golden("golden/vila/vila_main_embed") / "model" / "llm" / name, tmp_path / "qwen2" / name
        )
    return {
        SENTENCEPIECE: model,
        SENTENCEPIECE_NOT_LEGACY: model,
        TOKENIZERS: tmp_path / "qwen2" / "tokenizer.json",
    }


@pytest.mark.parametrize("kind", [SENTENCEPIECE, SENTENCEPIECE_NOT_LEGACY, TOKENIZERS])
def test_what_is_recorded_is_opened(tmp_path: Path, paths: dict[str, Path], kind: str) -> None:
    tokenizer = load_kind(paths[kind], kind)
    assert tokenizer.kind == kind
    record = TokenizerRecord.of(tokenizer)
    checkpoint = write_run(tmp_path / "run", tokenizer=record.to_dict())
    # By its record, by the flag, and by the folder that the file is in.
    for given in (None, paths[kind], paths[kind].parent):
        found, warning = open_tokenizer(checkpoint, given)
        assert (found.kind, found.sha256, warning) == (kind, tokenizer.sha256, None)
    # A dataset says it, too, and a run records what its data says.
    dataset = {"tokenizer_sha256": tokenizer.sha256, "tokenizer_kind": kind}
    assert recorded_tokenizer({"dataset": dataset}) == replace(record, path=None)
    config = RunConfig(data=DataConfig(tokenizer_model=str(paths[kind])))
    assert tokenizer_of_run(config, dataset) == record
    assert tokenizer_of_run(RunConfig(), dataset) == replace(record, path=None)


def test_a_checkpoint_that_says_nothing_is_read_as_its_family_is(
    tmp_path: Path, paths: dict[str, Path]
) -> None:
    for family, kind in (("eve", SENTENCEPIECE), ("vila", SENTENCEPIECE_NOT_LEGACY)):
        saved = RunConfig().to_dict() | {"family": family}
        saved["model"]["vocab_size"] = 384
        checkpoint = write_run(tmp_path / family, config=saved)
        found, warning = open_tokenizer(checkpoint, paths[kind])
        assert found.kind == kind and "does not say which tokenizer" in str(warning)


def test_weights_of_the_other_mode_are_refused(tmp_path: Path, paths: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(paths[SENTENCEPIECE], legacy=True)
    data = write_dataset(tmp_path / "set", 8, 0, tokenizer_sha256=tokenizer.sha256)
    for kind in (SENTENCEPIECE, SENTENCEPIECE_NOT_LEGACY):
        record = replace(TokenizerRecord.of(tokenizer), kind=kind)
        start = write_run(tmp_path / f"run_{kind[-5:]}", tokenizer=record.to_dict()).parent
        config = run_config(ONE.parallel, iterations=2)
        config = replace(
            config,
            data=replace(config.data, mock_data=False, data_path=(data,)),
            checkpoint=CheckpointConfig(pretrained_checkpoint=str(start)),
        )
        if kind == SENTENCEPIECE:
            check_run(config, 1)
            continue
        with pytest.raises(ConfigError) as caught:
            check_run(config, 1)
        message = str(caught.value)
        assert "was trained with the tokenizer mode 'sentencepiece legacy=False'" in message
        assert message.endswith("preprocess the data with --no-tokenizer-legacy")


def test_the_tokenizer_beside_the_weights_of_an_import(tmp_path: Path, paths: dict[str, Path]) -> None:
    for legacy, kind in ((True, SENTENCEPIECE), (False, SENTENCEPIECE_NOT_LEGACY)):
        found = source_tokenizer(paths[kind].parent, 384, legacy)
        assert found is not None and found.kind == kind
    found = source_tokenizer(paths[TOKENIZERS].parent, 496, legacy=False)
    assert found is not None and (found.kind, found.path) == (TOKENIZERS, str(paths[TOKENIZERS]))
    with pytest.raises(ConfigError, match="has 486 pieces, and the embedding 400 rows"):
        source_tokenizer(paths[TOKENIZERS].parent, 400, legacy=False)
    (paths[TOKENIZERS].parent / "tokenizer_config.json").unlink()
    assert source_tokenizer(paths[TOKENIZERS].parent, 496, legacy=False) is None


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (["vila15_v1"], "vila15_v1"),
        (["document", "llama_3"], "llama_3"),
        # Captions teach no conversation, and of two templates none is the one to ask with.
        (["plain"], "vicuna_v1"),
        (["vila_v1", "vila15_v1"], "vicuna_v1"),
        (["of_another_family"], "vicuna_v1"),
        ([], "vicuna_v1"),
    ],
)
def test_conversations_are_in_the_template_of_training(
    tmp_path: Path, templates: list[str], expected: str
) -> None:
    checkpoint = write_run(tmp_path / "run", dataset={"samples": [9], "templates": templates})
    for folder in (checkpoint.parent, checkpoint):
        assert chat_template(folder) == expected
