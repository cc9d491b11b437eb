"""The name table in both directions, and what a wrong Hugging Face folder is told."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eve.checkpoint.hf.rules import ignored_because, rules_of, to_hf
from megatron_eve.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_eve.models.decoder.names import DECODER_RULES
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.eve.family import FAMILY
from megatron_eve.models.eve.names import FRONT_END_RULES
from megatron_eve.models.eve.published import ALIGNING_HF_KEYS
from megatron_eve.models.name_rules import rule_for
from megatron_eve.models.tensor_layouts import QKV, Column, GatedMLP, Row, Sizes
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2_VPP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankError, RankPool


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("groups", [4, 8])
def test_round_trip(tensor_parallel: int, groups: int) -> None:
    """Hugging Face -> full -> shards -> full -> Hugging Face, with and without grouped queries."""
    heads, dim, width = 8, 4, 12
    sizes = Sizes(num_query_groups=groups, head_dim=dim, padded_vocab_size=512, vocab_size=500)
    query, key, value = (torch.randn(n * dim, width) for n in (heads, groups, groups))
    gate, up = torch.randn(16, width), torch.randn(16, width)
    for layout, parts in (
        (QKV(), [query, key, value]),
        (GatedMLP(), [gate, up]),
        (Column(), [torch.randn(8, width)]),
        (Row(), [torch.randn(width, 8)]),
    ):
        full = layout.merge(parts, sizes)
        shards = [layout.shard(full, rank, tensor_parallel) for rank in range(tensor_parallel)]
        back = layout.split(layout.unshard(shards), sizes, len(parts))
        assert all(torch.equal(a, b) for a, b in zip(parts, back, strict=True))


def test_qkv_is_grouped_as_megatron_wants() -> None:
    """Group g holds its queries, then its key, then its value."""
    sizes = Sizes(num_query_groups=2, head_dim=1, padded_vocab_size=0, vocab_size=0)
    query, key, value = (
        torch.tensor([[0.0], [1], [2], [3]]),
        torch.tensor([[10.0], [11]]),
        torch.tensor([[20.0], [21]]),
    )
    full = QKV().merge([query, key, value], sizes)
    assert full[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_vocabulary_padding_is_stripped() -> None:
    sizes = Sizes(num_query_groups=1, head_dim=1, padded_vocab_size=8, vocab_size=5)
    rule, _ = rule_for("output_layer.weight", DECODER_RULES)
    weight = torch.randn(5, 3)
    full = rule.layout.merge([weight], sizes)
    assert full.shape == (8, 3) and not full[5:].any()
    shards = [rule.layout.shard(full, rank, 2) for rank in range(2)]
    assert torch.equal(
        to_hf("output_layer.weight", shards, sizes, RunConfig(model=ModelConfig(vocab_size=5)))[
            "lm_head.weight"
        ],
        weight,
    )


def test_unknown_name() -> None:
    with pytest.raises(KeyError, match=r"no rule for decoder\.moe"):
        rule_for("decoder.moe", rules_of(RunConfig()))


def test_every_published_key_has_a_place() -> None:
    """98 keys are needed for inference, 13 by the aligning layer; everything else is ignored on purpose."""
    keys = set(load_file(find_golden("_shared/hf_mini224") / "model.safetensors"))
    inference = (*DECODER_RULES, *FRONT_END_RULES)
    fixed = {name.replace("*", str(i)) for rule in inference for name in rule.hf for i in range(8)}
    ours = {key for key in keys if key in fixed or key.startswith("model.vision_tower.")}
    assert len(ours) == 98
    aligning = {key for key in keys if ALIGNING_HF_KEYS.fullmatch(key)}
    rules = [rule for rule in rules_of(RunConfig()) if rule not in inference]
    assert aligning == {
        name.replace("*", end) for rule in rules for name in rule.hf for end in ("weight", "bias")
    }
    assert len(aligning) == 13
    assert all(ignored_because(FAMILY, key) for key in keys - ours - aligning)


def config(parallel: ParallelConfig, model: ModelConfig | None = None, **vision: Any) -> RunConfig:
    return RunConfig(
        model=model or ModelConfig(),
        parallel=parallel,
        training=TrainingConfig(transformer_impl="local"),
        vision=EVEConfig(**vision),
    )


def load_and_collect(some: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Runs on each rank: load the folder, then give every tensor back under its Hugging Face name."""
    from megatron.core import parallel_state

    from megatron_eve.checkpoint.hf.load import global_parameters, load_hf_weights
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.process_groups import model_parallel

    found: dict[str, torch.Tensor] = {}
    with model_parallel(some):
        chunks = build_chunks(some)
        load_hf_weights(folder, chunks, some)
        size = parallel_state.get_tensor_model_parallel_world_size()
        for name, parameter, padded in global_parameters(chunks):
            shards = [torch.empty_like(parameter) for _ in range(size)]
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_gather(shards, parameter.detach().contiguous(), group=group)
            found.update(to_hf(name, shards, Sizes.of(some.model, padded), some))
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("aligning", [False, True], ids=["plain", "aligning"])
@parametrize(ONE, TP2_SP, PP2_VPP2, TP2_PP2)
def test_loading_is_bit_exact(ranks: RankPool, layout: Layout, aligning: bool) -> None:
    folder = find_golden("_shared/hf_mini224")
    golden = load_file(folder / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    some_config = config(layout.parallel, patch_aligning=aligning)
    for some in ranks.run(layout.world_size, load_and_collect, some_config, folder):
        found.update(some)
    assert len(found) == 98 + 13 * aligning
    assert all(torch.equal(tensor, golden[name]) for name, tensor in found.items())


@pytest.mark.distributed
def test_published_taps_belong_to_every_fourth_depth(ranks: RankPool) -> None:
    some = config(ParallelConfig(), tap_interval=3, patch_aligning=True)
    with pytest.raises(RankError, match="tapped every 4 layers, this run has --tap-interval 3"):
        ranks.run(1, load_and_collect, some, find_golden("_shared/hf_mini224"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_golden("_shared/hf_mini224"), tmp_path / "hf"))


def error(ranks: RankPool, folder: Path, model: ModelConfig | None = None) -> str:
    with pytest.raises(RankError) as caught:
        ranks.run(1, load_and_collect, config(ParallelConfig(), model), folder)
    return str(caught.value)


@pytest.mark.distributed
def test_wrong_folders(ranks: RankPool, folder: Path) -> None:
    assert "intermediate_size is 160" in error(ranks, folder, replace(ModelConfig(), ffn_hidden_size=128))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    assert "has no tensor model.norm.weight" in error(ranks, folder)
    save_file({**tensors, "model.layers.0.moe.weight": torch.ones(1)}, folder / "model.safetensors")
    assert "holds model.layers.0.moe.weight, which no rule knows" in error(ranks, folder)
    save_file({**tensors, "model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    assert "final_layernorm.weight of shape (3,)" in error(ranks, folder)
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        save_file({**tensors, key: torch.ones(385, 9)}, folder / "model.safetensors")
        told = error(ranks, folder)
        assert key in told and "of shape () on this rank" in told
    quantised = torch.ones(64, dtype=torch.int8)
    save_file({**tensors, "model.norm.weight": quantised}, folder / "model.safetensors")
    assert "model.norm.weight is I8; quantised weights cannot be trained" in error(ranks, folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights (model.safetensors or" in error(ranks, folder)
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors: named by" in error(ranks, folder)


@pytest.mark.distributed
def test_sharded_folder(ranks: RankPool, folder: Path) -> None:
    """Shards with an index load as one file does."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = ranks.run(1, load_and_collect, config(ParallelConfig()), folder)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A plain language model of the test sizes, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    sizes = LlamaConfig(
        num_hidden_layers=8, hidden_size=64, intermediate_size=160, num_attention_heads=4, vocab_size=384,
        rms_norm_eps=1e-5, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(sizes).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE,))
@pytest.mark.parametrize("pickled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_plain_llama_fills_the_decoder(ranks: RankPool, llama: Path, layout: Layout, pickled: bool) -> None:
    """Its tensors arrive bit for bit; what it does not have keeps the weights that this seed begins with."""
    tensors = load_file(llama / "model.safetensors")
    if pickled:  # as Vicuna 7B v1.5 is on the hub: shards with an index
        names = sorted(tensors)
        for number, some in enumerate((names[::2], names[1::2])):
            torch.save({name: tensors[name] for name in some}, llama / f"{number}.bin")
        index = {"weight_map": {name: f"{i % 2}.bin" for i, name in enumerate(names)}}
        (llama / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (llama / "model.safetensors").unlink()
    some = config(layout.parallel, patch_aligning=True)
    found: dict[str, torch.Tensor] = {}
    for part in ranks.run(layout.world_size, load_and_collect, some, llama):
        found.update(part)
    assert len(found) == 98 + 13
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    new = [name for name in found if name not in tensors]
    assert all("vision_tower" in name or "mm_projector" in name for name in new)
    assert all(found[name].isfinite().all() for name in new)
    assert any(found[name].any() for name in new)


class Code:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.distributed
def test_a_pickle_with_code_in_it_is_refused(ranks: RankPool, llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Code(tmp_path / "made")}, llama / "pytorch_model.bin")
    assert f"{llama}/pytorch_model.bin: asks for posix.mkdir, and no code of a model folder runs" in error(
        ranks, llama
    )
    assert not (tmp_path / "made").exists()
