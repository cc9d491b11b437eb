"""A checkpoint is answered from with the tokenizer and the template that its data was made with, or it is said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError, unlike_training
from megatron_eve.checkpoint.tokenizer_record import TokenizerRecord, check_tokenizer, recorded_tokenizer
from megatron_eve.data.text.tokenizer import Tokenizer
from tests.golden_dir import find_golden
from tests.hf.test_export import spoilt_tokenizer
from tests.inference.test_tools import tool


@pytest.fixture(scope="module")
def right() -> Tokenizer:
    return Tokenizer(find_golden("tokenize") / "tokenizer.model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Another one of just as many pieces."""
    return Tokenizer(spoilt_tokenizer(tmp_path_factory.mktemp("other") / "t") / "tokenizer.model")


def saved(vocab_size: int, **more: Any) -> dict[str, Any]:
    """What of a checkpoint's `common.pt` is looked at."""
    return {"config": {"model": {"vocab_size": vocab_size}}, "dataset": None, **more}


def test_the_recorded_tokenizer_is_the_only_one(right: Tokenizer, other: Tokenizer) -> None:
    size, folder = right.vocab_size, Path("run/iter_0000002")
    assert other.vocab_size == size
    for common in (
        saved(size, dataset={"tokenizer_sha256": right.sha256}),
        saved(size, tokenizer_sha256=right.sha256),  # an import
        saved(size + 1, dataset={"tokenizer_sha256": right.sha256}),  # padded rows
    ):
        assert check_tokenizer(folder, common, right) is None
        with pytest.raises(
            CheckpointError, match=r"--tokenizer .*is another tokenizer .*run/iter_0000002 was"
        ):
            check_tokenizer(folder, common, other, "--tokenizer")


def test_a_checkpoint_that_does_not_say_takes_one_of_its_size_with_a_warning(right: Tokenizer) -> None:
    for dataset in (None, {}, {"tokenizer_sha256": "mock"}):
        warning = check_tokenizer(Path("run"), saved(right.vocab_size, dataset=dataset), right)
        assert warning is not None and "does not say which tokenizer" in warning
        with pytest.raises(CheckpointError, match="has 384 pieces, and the model 400; name the one"):
            check_tokenizer(Path("run"), saved(400, dataset=dataset), right)


def test_an_import_of_padded_rows_is_told_to_take_its_tokenizer_along(right: Tokenizer) -> None:
    """Made without it, it has only its rows to go by."""
    remedy = "put tokenizer.model beside the weights and import them again"
    with pytest.raises(CheckpointError, match=remedy):
        check_tokenizer(Path("run"), saved(400), right)
    for size, dataset in ((350, None), (400, {"tokenizer_sha256": "mock"})):
        with pytest.raises(CheckpointError) as caught:
            check_tokenizer(Path("run"), saved(size, dataset=dataset), right)
        assert remedy not in str(caught.value)


def test_an_import_records_the_tokenizer_of_its_source(
    exported: Path, tmp_path: Path, right: Tokenizer
) -> None:
    from megatron_eve.checkpoint.state import saved_common

    words = ["import", "--source", str(exported), "--target", str(tmp_path / "run")]
    assert tool("convert_checkpoint").main(words) == 0
    folder, common = saved_common(str(tmp_path / "run"))
    assert recorded_tokenizer(common) == TokenizerRecord(
        "sentencepiece", right.sha256, str(exported / "tokenizer.model")
    )
    assert check_tokenizer(folder, common, right) is None


@pytest.mark.parametrize(
    ("dataset", "stage", "told"),
    [
        (
            {"tokenizer_sha256": "a", "templates": ["plain"]},
            2,
            {"vicuna_v1": "captions, and taught no conver"},
        ),
        ({"tokenizer_sha256": "a", "templates": ["plain"]}, 3, {"vicuna_v1": "--conv-mode plain asks as it"}),
        (
            {"tokenizer_sha256": "a", "templates": ["vicuna_v1"]},
            3,
            {"plain": "--conv-mode vicuna_v1 asks as it"},
        ),
        ({"tokenizer_sha256": "a", "templates": ["plain", "vicuna_v1"]}, 3, {}),
        (
            {"tokenizer_sha256": "a", "templates": ["document"]},
            2,
            {
                "plain": "documents, and taught no conversation (template document, stage 2)",
                "vicuna_v1": "; train it on captions or conversations before it is asked",
            },
        ),
        (
            {"tokenizer_sha256": "a", "templates": ["document", "plain"]},
            2,
            {"vicuna_v1": "documents and captions, and taught no conversation"},
        ),
        (
            {"tokenizer_sha256": "a", "templates": ["document", "vicuna_v1"]},
            3,
            {"plain": "on documents and conversations (template document, vicuna_v1, stage 3)"},
        ),
        ({"tokenizer_sha256": "a"}, 2, {"vicuna_v1": "template plain, stage 2"}),  # an older version's
        ({"tokenizer_sha256": "a"}, 3, {"plain": "template vicuna_v1, stage 3"}),
        ({"tokenizer_sha256": "mock"}, 2, {}),
        (None, 2, {}),
    ],
)
def test_a_template_that_the_model_was_not_trained_on_is_said(
    dataset: dict[str, Any] | None, stage: int, told: dict[str, str]
) -> None:
    common = {"config": {"training": {"stage": stage}}, "dataset": dataset}
    for conv_mode in ("plain", "vicuna_v1"):
        warnings = unlike_training(Path("run"), common, conv_mode, True)
        assert len(warnings) == (conv_mode in told)
        assert told.get(conv_mode, "") in "".join(warnings)


def test_pictures_turned_otherwise_than_in_training_are_said() -> None:
    for before, now, remedy in ((True, False, "leave out"), (False, True, "add")):
        dataset = {"tokenizer_sha256": "a", "templates": ["plain"], "apply_exif": before}
        common = {"config": {"training": {"stage": 2}}, "dataset": dataset}
        (warning,) = unlike_training(Path("run"), common, "plain", now)
        assert warning.endswith(f"; {remedy} --ignore-exif-orientation")
        assert unlike_training(Path("run"), common, "plain", before) == []


def test_chat_refuses_another_tokenizer_of_the_same_size(
    exported: Path, tmp_path: Path, right: Tokenizer, other: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    shutil.copytree(exported.parent / "run", tmp_path / "run")
    (common,) = (tmp_path / "run").glob("iter_*/common.pt")
    content = torch.load(common, weights_only=False)
    torch.save({**content, "dataset": {"tokenizer_sha256": right.sha256}}, common)
    words = ["--model-path", str(tmp_path / "run"), "--tokenizer-model", other.path]
    assert tool("chat").main(words) != 0
    error = capsys.readouterr().err
    assert (
        f"error: --tokenizer-model {other.path}: is another tokenizer" in error and "Traceback" not in error
    )
