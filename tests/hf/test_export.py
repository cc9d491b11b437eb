"""What the command says when a folder for transformers cannot be made, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_eve.config import ConfigError, ParallelConfig, RunConfig
from megatron_eve.models.eve.config import EVEConfig
from tests.checkpoint.hf.test_tables import config, load_and_collect
from tests.convert.test_conversion import TEACHER, convert
from tests.golden_dir import find_golden
from tests.ranks import RankPool


def spoilt_tokenizer(folder: Path, vocab_size: int = 384) -> Path:
    """A sentencepiece model that changes texts before it cuts them."""
    import sentencepiece

    folder.mkdir()
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((find_golden("tokenize") / "corpus.txt").read_text().splitlines()),
            model_writer=file, model_type="bpe", vocab_size=vocab_size, byte_fallback=True, unk_id=0, bos_id=1,
            eos_id=2, pad_id=-1, minloglevel=2, normalization_rule_name="nmt_nfkc",
        )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the processor needs a tokenizer; add --tokenizer DIR"),
        (("--tokenizer", "nowhere"), "cannot read the tokenizer nowhere/tokenizer.model"),
        (
            ("--tokenizer", "tokenizer", "--teacher-model", "clip"),
            "it is for inference; leave --teacher-model out",
        ),
        (("--tokenizer", "spoilt"), "does not cut"),
    ],
    ids=["no tokenizer", "not there", "a teacher", "not Llama's"],
)
def test_wrong_flags_leave_nothing(
    exported: Path, tmp_path: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tokenizer": find_golden("tokenize"), "clip": find_golden(TEACHER)}
    if "spoilt" in words:
        places["spoilt"] = spoilt_tokenizer(tmp_path / "spoilt")
    command = (
        "export",
        "--source",
        exported.parent / "run",
        "--target",
        tmp_path / "out",
        "--format",
        "transformers",
    )
    assert convert(*command, *(places.get(word, word) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_the_folder_goes_back_in(exported: Path, tmp_path: Path) -> None:
    """It keeps the published names, so it is imported as any other; and what is exported again is the same."""
    words = ("--teacher-model", find_golden(TEACHER))
    assert convert("import", "--source", exported, "--target", tmp_path / "run", *words) == 0
    words = ("--format", "transformers", "--tokenizer", exported)
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back", *words) == 0
    for path in exported.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_generation_settings(exported: Path) -> None:
    fields = json.loads((exported / "generation_config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert fields == {**ids, "do_sample": False, "max_new_tokens": 256}


def test_both_sizes(exported: Path, tmp_path: Path) -> None:
    """The published weights are those of either size of picture; the folder says which."""
    teacher = find_golden("_shared/openai/clip-vit-large-patch14-336")
    words: tuple[Any, ...] = ("--source", find_golden("_shared/hf_672"), "--teacher-model", teacher)
    for size in (672, 1344):
        assert convert("import", "--target", tmp_path / f"run{size}", *words, "--image-size", size) == 0
        target = ("--source", tmp_path / f"run{size}", "--target", tmp_path / f"out{size}")
        assert (
            convert("export", *target, "--format", "transformers", "--tokenizer", find_golden("tokenize"))
            == 0
        )
        fields = json.loads((tmp_path / f"out{size}" / "preprocessor_config.json").read_text())
        assert (fields["image_size"], fields["image_size_clip"]) == (size, 336)
    shutil.rmtree(tmp_path)


def test_a_front_end_that_the_layout_cannot_say() -> None:
    from megatron_eve.convert.exporting import plan_export

    config = RunConfig(vision=EVEConfig(patch_embedding_heads=4))
    with pytest.raises(ConfigError, match="has 4 heads"):
        plan_export(Path("anywhere"), config, None, published=True, flags={})


@pytest.mark.distributed
@pytest.mark.slow
def test_a_folder_that_transformers_saved_again_starts_a_run(
    ranks: RankPool, exported: Path, tmp_path: Path
) -> None:
    """For --pretrained-checkpoint: the model alone, in shards, with the spelling of today's transformers."""
    from megatron_eve.checkpoint.hf.config import settings_of
    from megatron_eve.hf import EVELlamaForCausalLM

    EVELlamaForCausalLM.from_pretrained(exported).save_pretrained(tmp_path, max_shard_size="500KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    sizes = settings_of(tmp_path, image_size=224, teacher_size=112)
    assert sizes == settings_of(exported, image_size=224, teacher_size=112)
    again, before = (
        ranks.run(1, load_and_collect, config(ParallelConfig(), sizes.model), folder)[0]
        for folder in (tmp_path, exported)
    )
    assert again.keys() == before.keys()
    assert all(
        torch.equal(again[name], tensor)
        for name, tensor in before.items()
        if "vision_tower_compressor" not in name
    )
