"""Language models of the Llama and Qwen2 families: there and back bit for bit, and the same logits as transformers'."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_eve.config import TRACKER, CheckpointConfig, RunConfig, TrainingConfig
from megatron_eve.models.rope_scaling import scaling_field
from tests.checkpoint.hf.test_tables import error
from tests.convert.test_conversion import TEACHER, convert, pass_through
from tests.convert.vila_folders import edit_config
from tests.families.eve import run_config
from tests.golden_dir import find_golden
from tests.layouts import ONE, PP2, TP2, TP2_PP2, TP2_SP, Layout, parametrize
from tests.ranks import RankPool

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# At toy width, with what is theirs: grouped queries, bases and epsilons, tied ends, a vocabulary that is padded.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4, "rope_theta": 10000.0}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "rope_theta": 500000.0, "vocab_size": 1000}),
    "llama3 tied": ("Llama", {"num_key_value_heads": 2, "rope_theta": 500000.0, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-6}),
    "qwen2 tied": (
        "Qwen2",
        {"num_key_value_heads": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
    ),
    "linear": ("Llama", {"num_key_value_heads": 2, "rope_theta": 10000.0, "rope_scaling": LINEAR}),
    "llama3.1": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2 linear": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Two samples of one pack.
SAMPLES = ([1, *range(40, 90)], [1, *range(5, 300, 9)])


def transformers_model(kind: str, **other: Any) -> Any:
    """A model of transformers with random weights, none of them as it begins (biases zero, norms one).

    Args:
        kind: of `KINDS`.
        other: settings in place of that kind's.
    """
    import transformers

    family, settings = KINDS[kind]
    settings = {**settings, **other}
    sizes = {
        "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "vocab_size": 384, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, **deepcopy(settings),
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.copy_(torch.randn(weights.shape, generator=random) * 0.1 + name.endswith("norm.weight"))
    return model


def folder_of(tmp_path: Path, kind: str, dtype: str = "float32") -> Path:
    """The folder that transformers writes of it."""
    transformers_model(kind).to(DTYPES[dtype]).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def start_of(source: Path, target: Path) -> RunConfig:
    """Import it, with an aligning layer; the configuration of the checkpoint."""
    from megatron_eve.convert.exporting import open_checkpoint

    words = ("--teacher-model", find_golden(TEACHER), "--image-size", "224", "--patch-embedding-size", "32")
    assert convert("import", "--source", source, "--target", target, *words) == 0
    return open_checkpoint(target)[1]


def check_same(source: Path, back: Path) -> None:
    """Every tensor of the source comes back with the same bits; of a tied one the embedding comes twice."""
    tensors, found = (load_file(folder / "model.safetensors") for folder in (source, back))
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    others = [name for name in set(found) - set(tensors) if not name.endswith("inv_freq")]
    assert all(name.startswith(("model.vision_tower.", "model.mm_projector.")) for name in others)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[
            ("llama3", "float32"),
            ("llama3 tied", "bfloat16"),
            ("qwen2", "bfloat16"),
            ("qwen2 tied", "float32"),
            ("llama3.1", "float32"),
        ],
        *(
            pytest.param(kind, dtype, marks=pytest.mark.slow)
            for kind, dtype in (
                *(("llama3", "bfloat16"), ("qwen2", "float32"), ("qwen2 tied", "bfloat16")),
                *(("linear", "float32"), ("qwen2 linear", "bfloat16")),
            )
        ),
    ],
)
def test_there_and_back(tmp_path: Path, kind: str, dtype: str) -> None:
    source = folder_of(tmp_path, kind, dtype)
    model = start_of(source, tmp_path / "start").model
    assert (tmp_path / "start" / TRACKER).read_text() == "0"
    family, settings = KINDS[kind]
    expected = (2, settings["rope_theta"], settings.get("rms_norm_eps", 1e-5), family == "Qwen2")
    assert (model.num_query_groups, model.rotary_base, model.norm_epsilon, model.add_qkv_bias) == expected
    scaling = settings.get("rope_scaling")
    assert (scaling_field(model) is None) == (scaling is None)
    assert convert("export", "--source", tmp_path / "start", "--target", tmp_path / "back") == 0
    check_same(source, tmp_path / "back")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (fields["model_type"], fields["tie_word_embeddings"], fields["torch_dtype"]) == (
        "eve",
        False,
        dtype,
    )
    assert fields.get("qkv_bias") == (True if family == "Qwen2" else None)
    written = fields["rope_scaling"]
    if scaling is not None and "type" in written:
        written = {"rope_type": written["type"], "factor": written["factor"]}
    assert written == scaling
    if dtype == "bfloat16":
        return
    # What was written is read as the same model.
    assert convert("import", "--source", tmp_path / "back", "--target", tmp_path / "again") == 0
    assert convert("export", "--source", tmp_path / "again", "--target", tmp_path / "twice") == 0
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


@pytest.mark.distributed
@parametrize(TP2_PP2, slow=(ONE, TP2_SP, PP2))
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("qwen2 tied", "bfloat16"),
        *(
            pytest.param(kind, dtype, marks=pytest.mark.slow)
            for kind, dtype in (("qwen2 tied", "float32"), ("qwen2", "float32"), ("llama3", "bfloat16"))
        ),
    ],
)
def test_there_and_back_through_a_run(
    ranks: RankPool, tmp_path: Path, layout: Layout, kind: str, dtype: str
) -> None:
    source = folder_of(tmp_path, kind, dtype)
    start = start_of(source, tmp_path / "start")
    config = run_config(layout.parallel, bf16=dtype == "bfloat16")
    saved = CheckpointConfig(save=str(tmp_path / "saved"), pretrained_checkpoint=str(tmp_path / "start"))
    # The teacher is the run's.
    vision = replace(start.vision, patch_aligning=True, teacher_model=config.vision.teacher_model)
    config = replace(config, model=start.model, vision=vision, checkpoint=saved)
    ranks.run(layout.world_size, pass_through, config)
    assert convert("export", "--source", tmp_path / "saved", "--target", tmp_path / "back") == 0
    check_same(source, tmp_path / "back")


def text_logits(config: RunConfig, folder: Path) -> torch.Tensor:
    """Runs on each rank: logits [T, vocabulary] of SAMPLES in one pack, without an image."""
    from megatron_eve.checkpoint.hf.load import load_hf_weights
    from megatron_eve.models.build import build_chunks
    from megatron_eve.models.decoder.model import ModelInputs
    from megatron_eve.models.decoder.packed import packed_params
    from megatron_eve.models.process_groups import model_parallel

    lengths = [len(sample) for sample in SAMPLES]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs = ModelInputs(
        packed=packed_params(bounds, lengths),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        tokens=torch.tensor([*SAMPLES[0], *SAMPLES[1]]),
        output_rows=torch.arange(sum(lengths)),
    )
    with model_parallel(config), torch.no_grad():
        (model,) = build_chunks(config, freeze=False)
        load_hf_weights(folder, [model], config)
        return model(inputs)[:, : config.model.vocab_size]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "layout"),
    [*((kind, ONE) for kind in KINDS), ("llama3", TP2), ("qwen2 tied", TP2), ("llama3.1", TP2)],
    ids=lambda value: value.name if isinstance(value, Layout) else value,
)
def test_logits_are_those_of_transformers(ranks: RankPool, tmp_path: Path, layout: Layout, kind: str) -> None:
    from megatron_eve.checkpoint.hf.config import settings_of

    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)
    config = RunConfig(
        **settings_of(tmp_path, image_size=224, teacher_size=112)._asdict(),
        parallel=layout.parallel,
        training=TrainingConfig(transformer_impl="local"),
    )
    with torch.no_grad():
        expected = torch.cat([theirs(torch.tensor([sample])).logits[0] for sample in SAMPLES])
    assert float(expected.std()) > 0.5
    if "rope_scaling" in KINDS[kind][1]:
        unscaled = transformers_model(kind, rope_scaling=None)
        with torch.no_grad():
            others = torch.cat([unscaled(torch.tensor([sample])).logits[0] for sample in SAMPLES])
        assert float((others - expected).abs().max()) > 1e-3, "the samples are long enough to tell"
    for found in ranks.run(layout.world_size, text_logits, config, tmp_path):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.distributed
def test_a_run_of_another_kind_is_told(ranks: RankPool, tmp_path: Path) -> None:
    """Biases or key/value heads that the run's model does not have, or has and the folder lacks."""
    from megatron_eve.checkpoint.hf.config import settings_of

    source = folder_of(tmp_path, "qwen2")
    model = settings_of(source, image_size=224, teacher_size=112).model
    told = error(ranks, source, replace(model, add_qkv_bias=False))
    assert "config.json: qkv_bias is True, this run has --add-qkv-bias False" in told
    told = error(ranks, source, replace(model, num_query_groups=None))
    assert "config.json: num_key_value_heads is 2, this run has --num-query-groups 4" in told


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_sliding_window": True},
            "use_sliding_window is True, and attention has no sliding window here",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention', and",
        ),
        ({"num_hidden_layers": "four"}, "has no num_hidden_layers above 0"),
        ({"num_key_value_heads": [2]}, "has no num_key_value_heads above 0"),
        ({"layer_types": 7}, "layer_types has '7', and"),
        ({"attention_bias": True}, "attention has no biases here but Qwen2's"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    source = folder_of(tmp_path, "qwen2")
    edit_config(source, **fields)
    assert convert("import", "--source", source, "--target", tmp_path / "start") == 2
    told = capsys.readouterr().err
    assert f"error: {source}/config.json: " in told and message in told
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("change", ["biases", "no biases"])
def test_biases_are_there_as_the_kind_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    from safetensors.torch import save_file

    source = folder_of(tmp_path, "qwen2" if change == "no biases" else "llama3")
    tensors = load_file(source / "model.safetensors")
    if change == "no biases":
        del tensors["model.layers.1.self_attn.k_proj.bias"]
    else:
        tensors["model.layers.1.self_attn.k_proj.bias"] = torch.ones(32)
    save_file(tensors, source / "model.safetensors")
    assert convert("import", "--source", source, "--target", tmp_path / "start") == 2
    told = capsys.readouterr().err
    assert "model.layers.1.self_attn.k_proj.bias" in told
    assert ("has no tensor" if change == "no biases" else "that no rule knows") in told
