"""The published checkpoints, whole: every key of an EVE-7B has its place, and pickled shards are read as they are.

The key set is that of BAAI/EVE-7B-v1.0: what transformers 4.31 saves of a Llama, the patch embedding, the projector,
the aligning layer, and the teacher under two names that share their storage.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.config import PRESETS, RunConfig
from tests.convert.test_conversion import TEACHER, convert
from tests.golden_dir import find_golden

ALIASES = ("model.vision_clip.backbone.", "model.vision_tower_compressor.clip_layer.backbone.")


def published_shapes(
    layers: int = 32, width: int = 4096, inner: int = 11008, vocabulary: int = 32000,
    patch_width: int = 1024, teacher_width: int = 1024, teacher_layers: int = 24,
) -> dict[str, dict[str, tuple[int, ...]]]:  # fmt: skip
    """Keys and shapes of a published checkpoint, by part; written down from what is public, not from our rules."""
    D, F, C, K = width, inner, patch_width, teacher_width
    llama: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, D), "model.norm.weight": (D,), "lm_head.weight": (vocabulary, D),
    }  # fmt: skip
    for i in range(layers):
        layer = f"model.layers.{i}"
        llama |= {f"{layer}.self_attn.{p}_proj.weight": (D, D) for p in "qkvo"}
        llama |= {f"{layer}.mlp.{p}_proj.weight": (F, D) for p in ("gate", "up")}
        llama[f"{layer}.mlp.down_proj.weight"] = (D, F)
        llama |= {f"{layer}.{p}_layernorm.weight": (D,) for p in ("input", "post_attention")}
        llama[f"{layer}.self_attn.rotary_emb.inv_freq"] = (64,)
    embedding = {
        **{f"model.vision_tower.{p}_embedding": (C,) for p in ("class", "split")},
        "model.vision_tower.patch_embedding.weight": (C, 3, 14, 14),
    }
    for attention in ("local", "global"):
        for part, outputs in (("q", C), ("kv", 2 * C)):
            name = f"model.vision_tower.{attention}_attention.{part}"
            embedding |= {f"{name}.0.weight": (C,), f"{name}.0.bias": (C,), f"{name}.1.weight": (outputs, C)}
        name = f"model.vision_tower.{attention}_attention.proj"
        embedding |= {f"{name}.weight": (C, C), f"{name}.bias": (C,)}
    projector = {
        f"model.mm_projector.{i}.{p}": (D, n)[: 2 - (p == "bias")]
        for i, n in ((0, C), (2, D))
        for p in ("weight", "bias")
    }
    aligning: dict[str, tuple[int, ...]] = {}
    for j in range(layers // 4 + 1):
        name = f"model.vision_tower_compressor.norm_layer.{j}"
        aligning |= {f"{name}.0.weight": (D,), f"{name}.0.bias": (D,), f"{name}.1.weight": (K, D)}
    for name, n in (("input_layer", D), ("output_layer", K)):
        full = f"model.vision_tower_compressor.{name}"
        aligning |= {f"{full}.weight": (K, n), f"{full}.bias": (K,)}
    teacher = dict(clip_shapes(K, teacher_layers))
    both = {f"{alias}{key}": shape for alias in ALIASES for key, shape in teacher.items()}
    return {
        "Llama": llama, "patch embedding": embedding, "projector": projector, "aligning": aligning, "teacher": both,
    }  # fmt: skip


def clip_shapes(width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """CLIP ViT-L/14-336's vision tower, as transformers names it."""
    yield "vision_model.embeddings.class_embedding", (width,)
    yield "vision_model.embeddings.patch_embedding.weight", (width, 3, 14, 14)
    yield "vision_model.embeddings.position_embedding.weight", (577, width)
    parts = {"pre_layrnorm": (width,), "post_layernorm": (width,)}
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        parts |= {f"{layer}.self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
        parts |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
        parts |= {f"{layer}.layer_norm{n}": (width,) for n in (1, 2)}
    for name, shape in parts.items():
        yield f"vision_model.{name}.weight", shape
        yield f"vision_model.{name}.bias", shape[:1]


class Names:
    """A folder of names and shapes without data."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
        self.folder, self._shapes = folder, shapes

    def keys(self) -> Iterator[str]:
        return iter(self._shapes)

    def describe(self, key: str) -> tuple[torch.Size, torch.dtype]:
        kind = torch.float32 if key.endswith("inv_freq") else torch.bfloat16
        return torch.Size(self._shapes[key]), kind


@pytest.mark.parametrize("aligning", [True, False], ids=["to go on", "for inference"])
@pytest.mark.parametrize("preset", ["eve_7b", "eve_7b_hd"])
def test_every_key_of_an_eve_7b_is_accounted_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, aligning: bool
) -> None:
    """1,159 keys of 14.23 GB: mapped into ours, or left out for a reason; and nothing of ours begins at random."""
    from megatron_eve.convert import importing
    from megatron_eve.models.eve.family import FAMILY
    from megatron_eve.models.eve.hf.config import published_config

    parts = published_shapes()
    assert {name: len(part) for name, part in parts.items()} == {
        "Llama": 323, "patch embedding": 19, "projector": 4, "aligning": 31, "teacher": 2 * 391,
    }  # fmt: skip
    shapes = {key: shape for part in parts.values() for key, shape in part.items()}
    assert len(shapes) == 1159
    numbers = sum(
        torch.Size(shape).numel() for key, shape in shapes.items() if not key.startswith(ALIASES[1])
    )
    assert numbers * 2 == pytest.approx(14.230e9, rel=1e-4)  # what the two published shards hold
    sizes = PRESETS[preset]
    (tmp_path / "config.json").write_text(json.dumps(published_config(*sizes, "bfloat16", {}, True)))
    monkeypatch.setattr(importing, "open_weights", lambda folder, folders, config: Names(shapes, folder))
    flags = dict.fromkeys(("teacher_model", "image_size", "patch_embedding_size"))
    config = importing.import_config(tmp_path, FAMILY, flags)
    config = replace(config, vision=replace(config.vision, patch_aligning=aligning))
    assert config == RunConfig(model=sizes.model, vision=replace(sizes.vision, patch_aligning=aligning))
    plan = importing.plan_import(tmp_path, config, None, seed=1)
    mapped = {name for names in plan.mapped.values() for name in names}
    assert not plan.initialised and not mapped & set(plan.dropped)
    assert mapped | set(plan.dropped) == set(shapes)
    assert len(mapped) == 323 - 32 + 19 + 4 + 31 * aligning
    assert Counter(why.split(",")[0] for why in plan.dropped.values()) == {
        "the teacher": 782, "a buffer that is computed": 32, **({} if aligning else {"the aligning layer": 31}),
    }  # fmt: skip


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """The published toy as the published folders are: two pickled shards, the teacher twice in shared storage."""
    published = find_golden("_shared/hf_mini224")
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copyfile(published / "config.json", folder / "config.json")
    tensors = load_file(published / "model.safetensors")
    first, second = ALIASES
    teacher = [key for key in tensors if key.startswith(first)]
    tensors |= {second + key.removeprefix(first): tensors[key] for key in teacher}
    places = {key: f"pytorch_model-0000{1 + ('vision' in key)}-of-00002.bin" for key in tensors}
    for shard in set(places.values()):
        torch.save({key: tensors[key] for key, place in places.items() if place == shard}, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    held = sum(t.nbytes for key, t in tensors.items() if "vision" in key and not key.startswith(second))
    size = (folder / "pytorch_model-00002-of-00002.bin").stat().st_size
    assert held < size < held + 50_000, "the teacher lies in the file once"
    return folder


def test_pickled_shards_to_go_on_from(
    tmp_path: Path, pickled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the teacher the aligning layer is kept, and an export gives every published tensor back."""
    words = ("--teacher-model", find_golden(TEACHER))
    assert convert("import", "--source", pickled, "--target", tmp_path / "start", *words) == 0
    printed = capsys.readouterr().out
    assert "mapped       111 tensors of the Hugging Face layout" in printed
    assert "dropped      110: the teacher" in printed and "initialised" not in printed
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back", *words) == 0
    published = find_golden("_shared/hf_mini224") / "model.safetensors"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == published.read_bytes()


def test_pickled_shards_for_inference(
    tmp_path: Path, pickled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert("import", "--source", pickled, "--target", tmp_path / "start") == 0
    printed = capsys.readouterr().out
    assert "mapped       98 tensors of the Hugging Face layout" in printed
    assert "dropped      13: the aligning layer, which this checkpoint is made without" in printed
