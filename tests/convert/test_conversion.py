"""Conversion there and back: bit for bit under every layout, each tensor accounted for, and nothing half written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.config import CheckpointConfig, RunConfig
from tests.families.eve import run_config
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
TEACHER = "_shared/openai/clip-mini-patch14-112"


def _command() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location(
        "convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def convert(*words: object) -> int:
    """Run tools/convert_checkpoint.py in this process; its exit status."""
    return _command()([str(word) for word in words])


@pytest.fixture
def teacher() -> Path:
    return find_golden(TEACHER)


@pytest.fixture
def published() -> Path:
    return find_golden("_shared/hf_mini224")


def llama(folder: Path, **settings: Any) -> Path:
    """A language model at toy width, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "vocab_size": 384, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, **settings,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def pass_through(config: RunConfig) -> None:
    """Runs on each rank: load weights under a layout, and save them again."""
    from megatron_eve.checkpoint.saver import CheckpointSaver
    from megatron_eve.models.process_groups import model_parallel
    from megatron_eve.training.loop.train import setup, train_one

    with model_parallel(config):
        trainer = setup(config)
        train_one(
            trainer
        )  # at a rate of zero, as the first step of a warm-up: an optimizer has a state after it
        CheckpointSaver(config).save(
            trainer.train_state, trainer.chunks, trainer.optimizer, trainer.data.fingerprint
        )
        trainer.loader.close()


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE, TP2_SP, PP2))
@pytest.mark.parametrize(
    "bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
def test_there_and_back_under_a_layout(
    ranks: RankPool, tmp_path: Path, layout: Layout, bf16: bool, published: Path, teacher: Path
) -> None:
    """A published folder, through a run's checkpoint: the very same bytes of weights."""
    if bf16:
        published = edited(tmp_path / "published", published, _halve, torch_dtype="bfloat16")
    start, saved, back = (tmp_path / name for name in ("start", "saved", "back"))
    assert convert("import", "--source", published, "--target", start, "--teacher-model", teacher) == 0
    checkpoint = CheckpointConfig(save=str(saved), pretrained_checkpoint=str(start))
    config = replace(run_config(layout.parallel, bf16=bf16), checkpoint=checkpoint)
    ranks.run(layout.world_size, pass_through, config)
    assert convert("export", "--source", saved, "--target", back, "--teacher-model", teacher) == 0
    assert (back / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()


def _halve(tensors: dict[str, torch.Tensor]) -> None:
    """All weights in bfloat16; the rotary frequencies stay as they are, as published."""
    tensors.update({k: t.bfloat16() for k, t in tensors.items() if not k.endswith("inv_freq")})


def test_the_other_files_are_the_published_ones(tmp_path: Path) -> None:
    published, teacher = (
        find_golden(f"_shared/{name}") for name in ("hf_672", "openai/clip-vit-large-patch14-336")
    )
    words = ("--teacher-model", teacher)
    assert convert("import", "--source", published, "--target", tmp_path / "start", *words) == 0
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back", *words) == 0
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", published)
    )
    assert ours == theirs
    processor = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    golden = find_golden("_shared/openai/eve-patch14-anypixel-672") / "preprocessor_config.json"
    assert processor == json.loads(golden.read_text())
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()


def test_for_inference_alone(tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a teacher: what inference needs, in bfloat16, in shards with an index, with the tokenizer's files."""
    tokenizer = find_golden("tokenize") / "tokenizer.model"
    words = ("--dtype", "bfloat16")
    assert convert("import", "--source", published, "--target", tmp_path / "start", *words) == 0
    printed = capsys.readouterr().out
    assert "dropped      13: the aligning layer, which this checkpoint is made without" in printed
    assert "dropped      55: the teacher" in printed and "dropped      8: a buffer" in printed
    assert "mapped       98 tensors of the Hugging Face layout, 74 of ours" in printed
    words = ("--tokenizer", tokenizer.parent, "--max-shard-size", "200KB")
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back", *words) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    golden = load_file(published / "model.safetensors")
    found = {}
    for shard in set(index["weight_map"].values()):
        found.update(load_file(tmp_path / "back" / shard))
    assert set(found) == set(index["weight_map"])
    weights = [name for name in found if not name.endswith("inv_freq")]
    assert len(weights) == 98 and len(found) == 98 + 8
    assert all(torch.equal(found[name], golden[name].bfloat16()) for name in weights)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["requires_cliploss"], config["torch_dtype"]) == (False, "bfloat16")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


@pytest.mark.distributed
def test_a_run_starts_from_a_language_model(ranks: RankPool, tmp_path: Path, teacher: Path) -> None:
    """Stage 1 from what an import wrote: it trains, under TP 2 x PP 2, and two starts are alike bit for bit."""
    from tests.families.suite import run

    source = llama(tmp_path / "llama", num_hidden_layers=8)
    words = ("--teacher-model", teacher, "--image-size", "224", "--patch-embedding-size", "32", "--seed", "5")
    assert convert("import", "--source", source, "--target", tmp_path / "start", *words) == 0
    some = run_config(TP2_PP2.parallel, iterations=3, stage=1)
    some = replace(some, checkpoint=CheckpointConfig(pretrained_checkpoint=str(tmp_path / "start")))
    first, second = (ranks.run(4, run, some)[-1] for _ in range(2))
    assert first.losses == second.losses
    assert all(0 < loss < 20 for loss in first.losses)


def test_a_dry_run_writes_nothing(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("import", "--source", published, "--target", tmp_path / "start", "--dry-run") == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert "  embedding.word_embeddings.weight <-> model.embed_tokens.weight" in printed
    assert "model.layers.7.self_attn.q_proj.weight, model.layers.7.self_attn.k_proj.weight" in printed


def edited(
    folder: Path, source: Path, change: Callable[[dict[str, torch.Tensor]], object], **fields: Any
) -> Path:
    """A copy of a folder with other tensors, or other fields in its config.json."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_conversion_that_is_cut_short_leaves_nothing(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of writing, either way."""
    from megatron_eve.checkpoint.hf import folder as hf_folder

    assert convert("import", "--source", published, "--target", tmp_path / "start") == 0
    real, made = hf_folder.LazyTensor.tensor, 0

    def stop(self: hf_folder.LazyTensor) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == 40:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(hf_folder.LazyTensor, "tensor", stop)
    assert convert("import", "--source", published, "--target", tmp_path / "other") == 130
    assert list((tmp_path / "other").iterdir()) == []
    made = 0
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back") == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "start"]


def test_what_exists_is_not_written_over(
    tmp_path: Path, published: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        status = convert("import", "--source", published, "--target", tmp_path / "start")
    assert status == 2 and f"error: {tmp_path}/start: holds a run already" in capsys.readouterr().err
    (tmp_path / "back").mkdir()
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back") == 2
    assert f"error: {tmp_path}/back: exists already" in capsys.readouterr().err
    shard = next((tmp_path / "start" / "iter_0000000").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "new") == 2
    assert f"{shard.name} is damaged" in capsys.readouterr().err
