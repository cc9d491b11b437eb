"""EVE v2's folders to a checkpoint and back, and a language model whose weights become experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_eve.checkpoint.hf.config import settings_of
from megatron_eve.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from tests.convert.test_conversion import convert, pass_through
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool


@pytest.mark.parametrize("name", ["hf_all", "hf_stage0"])
def test_published_folders_come_back(tmp_path: Path, name: str) -> None:
    source = find_golden("eve_v2") / "_shared" / name
    assert convert("import", "--source", source, "--target", tmp_path / "run") == 0
    assert convert("export", "--source", tmp_path / "run", "--target", tmp_path / "back") == 0
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    assert all(theirs[key].equal(ours[key]) for key in theirs)
    written, published = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "back", source)
    )
    for field in ("model_type", "architectures", "add_moe", "moe_part", "mm_hidden_size", "hidden_size"):
        assert written[field] == published.get(field), field


@pytest.mark.parametrize("source", ["hf_qwen2", "hf_stage0"])
def test_experts_begin_as_copies(tmp_path: Path, source: str) -> None:
    """The copy of the published script: each tensor of an expert is its twin's, and nothing else changes."""
    folder = find_golden("eve_v2") / "_shared" / source
    flags = ("--family", "eve2", "--patch-embedding-size", 24) if source == "hf_qwen2" else ()
    target = tmp_path / "run"
    assert convert("import", "--source", folder, "--target", target, "--modality-experts", *flags) == 0
    assert convert("export", "--source", target, "--target", tmp_path / "back") == 0
    ours = load_file(tmp_path / "back" / "model.safetensors")
    theirs = load_file(find_golden("eve_v2") / "_shared" / "hf_init_copy" / "model.safetensors")
    language = {key for key in theirs if "vision_tower" not in key}
    assert all(theirs[key].equal(ours[key]) for key in language)
    assert theirs.keys() == ours.keys()


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE, TP2_SP, PP2))
def test_a_folder_for_transformers_through_a_run(ranks: RankPool, tmp_path: Path, layout: Layout) -> None:
    """Loaded, trained for a step at a rate of zero under a layout, and exported: the very same bytes of weights."""
    published, start, run, back = (
        find_golden("eve_v2") / "_shared" / "hf_all",
        *(tmp_path / name for name in ("start", "run", "back")),
    )
    assert convert("import", "--source", published, "--target", tmp_path / "import") == 0
    words = ("--format", "transformers", "--tokenizer", published)
    assert convert("export", "--source", tmp_path / "import", "--target", start, *words) == 0
    sizes = settings_of(start)
    config = RunConfig(
        family=sizes.family,
        model=sizes.model,
        vision=sizes.vision,
        parallel=layout.parallel,
        training=TrainingConfig(global_batch_size=4, train_iters=20, stage=2),
        optimizer=OptimizerConfig(lr=4e-5, lr_warmup_fraction=0.1),
        data=DataConfig(mock_data=True, seq_length=256),
        checkpoint=CheckpointConfig(save=str(run), pretrained_checkpoint=str(start)),
    )
    ranks.run(layout.world_size, pass_through, config)
    # The run's data is mock data, so it knows no tokenizer, which the published layout needs none of.
    assert convert("export", "--source", run, "--target", back) == 0
    assert (back / "model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()
