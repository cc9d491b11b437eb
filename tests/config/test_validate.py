"""Wrong combinations are refused before any process group exists, naming the flag and the remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_eve.config import (
    PRESETS,
    TRACKER,
    ConfigError,
    RunConfig,
    from_dict,
    validate,
)
from megatron_eve.models.eve.config import TEACHER_FLAGS
from megatron_eve.models.towers.sizes import TowerSizes, tower_sizes

OVERLAP = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "tp_comm_overlap": True}


def config(**sections: dict[str, object]) -> RunConfig:
    base = RunConfig(**PRESETS["eve_tiny"]._asdict()).to_dict()
    base["training"]["train_iters"] = 10
    base["data"]["mock_data"] = True
    for section, values in sections.items():
        base[section].update(values)
    return from_dict(base, "test")


def test_a_good_configuration() -> None:
    validate(config(), 1)
    layout = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
        "num_layers_per_virtual_pipeline_stage": 1,
    }
    validate(config(parallel=layout), 8)


# Data of a run without mock data.
BLEND: dict[str, object] = {"mock_data": False, "data_path": ("a",)}
WEIGHTED = BLEND | {"data_path": ("1", "a", "2", "b")}


@pytest.mark.parametrize(
    ("sections", "flag", "remedy"),
    [
        (
            {"parallel": {"tensor_model_parallel_size": 3}},
            "--tensor-model-parallel-size 3",
            "start a multiple of 3",
        ),
        ({"parallel": {"tensor_model_parallel_size": 0}}, "--tensor-model-parallel-size 0", "at least 1"),
        ({"parallel": {"tensor_model_parallel_size": 8}}, "--tensor-model-parallel-size 8", "must divide"),
        ({"parallel": {"sequence_parallel": True}}, "--sequence-parallel", "above 1"),
        (
            {"parallel": {"decoder_first_pipeline_num_layers": 2}},
            "--decoder-first-pipeline-num-layers 2",
            "above 1 or leave it out",
        ),
        (
            {"parallel": {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 0}},
            "--decoder-last-pipeline-num-layers 0",
            "at least 1",
        ),
        (
            {
                "parallel": {
                    "pipeline_model_parallel_size": 2,
                    "decoder_first_pipeline_num_layers": 1,
                    "decoder_last_pipeline_num_layers": 1,
                }
            },
            "--decoder-last-pipeline-num-layers 1",
            "add up to --num-layers",
        ),
        (
            {"parallel": {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 4}},
            "--decoder-first-pipeline-num-layers 4",
            "share them equally",
        ),
        ({"training": {"fp8_format": "hybrid"}}, "--fp8-format hybrid", "add --bf16"),
        (
            {"training": {"fp8_format": "hybrid", "bf16": True, "transformer_impl": "local"}},
            "--fp8-format hybrid",
            "leave --transformer-impl out",
        ),
        (
            {
                "training": {"fp8_format": "e4m3", "bf16": True},
                "parallel": {"tensor_model_parallel_size": 4},
            },
            "--fp8-format e4m3",
            "--ffn-hidden-size 352 on 4",
        ),
        (
            {"training": {"fp8_format": "hybrid", "bf16": True}, "data": {"seq_length": 1000}},
            "--seq-length 1000",
            "must be a multiple of 16 with",
        ),
        (
            {
                "training": {"fp8_format": "hybrid", "fp8_recipe": "blockwise", "bf16": True},
                "parallel": {"context_parallel_size": 2},
                "data": {"seq_length": 2176},
            },
            "--seq-length 2176",
            "must be a multiple of 256 with",
        ),
        (
            {
                "model": {"hidden_size": 192},
                "training": {"fp8_format": "e4m3", "fp8_recipe": "blockwise", "bf16": True},
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            },
            "--fp8-recipe blockwise",
            "--hidden-size 192 is no multiple",
        ),
        ({"training": {"fp8_recipe": "tensorwise"}}, "--fp8-recipe tensorwise", "add that, or leave it out"),
        (
            {"training": {"bf16": True}, "parallel": {"tp_comm_overlap": True}},
            "--tp-comm-overlap",
            "add that, or leave it out",
        ),
        (
            {"training": {"bf16": True}, "parallel": {**OVERLAP, "variable_seq_lengths": True}},
            "--tp-comm-overlap",
            "leave --variable-seq-lengths out",
        ),
        ({"parallel": OVERLAP}, "--tp-comm-overlap", "add --bf16"),
        (
            {"training": {"bf16": True, "transformer_impl": "local"}, "parallel": OVERLAP},
            "--tp-comm-overlap",
            "leave --transformer-impl out",
        ),
        (
            {
                "training": {"bf16": True, "fp8_format": "e4m3", "fp8_recipe": "blockwise"},
                "parallel": OVERLAP,
            },
            "--tp-comm-overlap",
            "use delayed or tensorwise",
        ),
        ({"training": {"cross_entropy_loss_fusion": True}}, "--cross-entropy-loss-fusion", "add --bf16"),
        ({"training": {"cross_entropy_fusion_impl": "te"}}, "--cross-entropy-fusion-impl te", "add that"),
        (
            {"training": {"recompute_modules": ["mlp"]}},
            "--recompute-modules",
            "add that, or leave it out",
        ),
        (
            {"training": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
            "--recompute-modules moe",
            "choose from core_attn",
        ),
        (
            {"parallel": {"context_parallel_size": 3}},
            "--tensor-model-parallel-size 1",
            "start a multiple of 3",
        ),
        ({"parallel": {"context_parallel_size": 2}, "data": {"seq_length": 510}}, "--seq-length 510", "of 4"),
        ({"vision": {"tap_interval": 0}}, "--tap-interval 0", "at least 1"),
        ({"parallel": {"overlap_param_gather": True}}, "--overlap-param-gather", "--overlap-grad-reduce"),
        ({"parallel": {"num_layers_per_virtual_pipeline_stage": 1}}, "--num-layers-per-virtual", "above 1"),
        (
            {"parallel": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}},
            "--num-layers-per-virtual-pipeline-stage 2",
            "leave the flag out",
        ),
        ({"faults": {"spike_factor": 0.5}}, "--spike-factor 0.5", "such as 10"),
        (
            {
                "parallel": {
                    "pipeline_model_parallel_size": 2,
                    "num_layers_per_virtual_pipeline_stage": 1,
                    "overlap_grad_reduce": True,
                },
                "faults": {"rerun_mode": "validate_results"},
            },
            "--rerun-mode validate_results",
            "leave one out",
        ),
        ({"model": {"num_attention_heads": 7}}, "--hidden-size 128", "--num-attention-heads 7"),
        ({"model": {"num_query_groups": 3}}, "--num-query-groups 3", "must divide"),
        ({"vision": {"image_size": 700}}, "--image-size 700", "even multiple"),
        ({"vision": {"image_size": 336, "teacher_size": 336}}, "--image-size 336", "even multiple"),
        ({"vision": {"patch_embedding_heads": 5}}, "--patch-embedding-size", "--patch-embedding-heads 5"),
        ({"training": {"train_iters": None}}, "--train-iters", "--train-samples"),
        ({"training": {"train_samples": 5}}, "--train-samples", "not both"),
        ({"training": {"global_batch_size": 0}}, "--global-batch-size 0", "at least 1"),
        (
            {"training": {"recompute_granularity": "full"}},
            "--recompute-granularity full",
            "--recompute-method",
        ),
        (
            {
                "training": {
                    "recompute_granularity": "full",
                    "recompute_method": "uniform",
                    "recompute_num_layers": 3,
                }
            },
            "--recompute-num-layers 3",
            "the 4 layers",
        ),
        ({"training": {"recompute_method": "uniform"}}, "--recompute-method", "leave it out"),
        ({"training": {"transformer_impl": "transformer_engine"}}, "--transformer-impl", "add --bf16"),
        ({"optimizer": {"min_lr": 1.0}}, "--min-lr 1.0", "between 0 and --lr"),
        ({"optimizer": {"lr_warmup_fraction": 1.5}}, "--lr-warmup-fraction 1.5", "[0, 1)"),
        ({"optimizer": {"clip_grad": -1.0}}, "--clip-grad -1.0", "no clipping"),
        (
            {"optimizer": {"lr_overrides": {"vision_model.*": -1}}},
            "--lr-overrides vision_model.*",
            "negative",
        ),
        ({"data": {"mock_data": False}}, "--data-path", "tools/preprocess_data.py"),
        ({"data": {"data_path": ("x",)}}, "--mock-data", "leave --data-path out"),
        ({"data": BLEND | {"data_path": ("0.5", "a", "-1", "b")}}, "--data-path -1 b", "must be positive"),
        ({"data": BLEND | {"data_path": ("0.5", "a", "b")}}, "--data-path 0.5 a b", "a weight before each"),
        ({"data": BLEND | {"data_path": ("a", "b", "./a")}}, "--data-path a", "comes twice"),
        (
            {"data": BLEND | {"data_path": ("1", "a", "1e-8", "b")}},
            "--data-path 1e-08 b",
            "less than one sample in",
        ),
        ({"data": BLEND | {"split": "99"}}, "--split 99", "such as 99,1"),
        ({"data": BLEND | {"split": "0,1"}}, "--split 0,1", "such as 99,1"),
        ({"data": BLEND | {"split": "98,1,1"}}, "--split 98,1,1", "such as 99,1"),
        ({"data": BLEND | {"valid_data_path": ("b",)}}, "--valid-data-path", "--eval-interval"),
        (
            {"data": BLEND | {"valid_data_path": ("1", "b", "2", "c")}},
            "--valid-data-path",
            "leave the weights out",
        ),
        ({"data": BLEND | {"valid_data_path": ("./a",)}}, "--valid-data-path ./a", "--split"),
        ({"data": WEIGHTED | {"group_by_modality": True}}, "--group-by-modality", "weights"),
        (
            {"data": BLEND | {"shuffle": False, "group_by_modality": True}},
            "--group-by-modality",
            "--no-shuffle",
        ),
        ({"data": {"valid_data_path": ("b",)}}, "--mock-data", "--valid-data-path"),
        (
            {"model": {"modality_experts": True}, "vision": {"patch_aligning": True}},
            "--modality-experts: align loss of --family eve",
            "leave it out",
        ),
        ({"training": {"eval_interval": 5}}, "--eval-interval", "--split"),
        ({"training": {"eval_interval": 0}, "data": {"split": "9,1"}}, "--eval-interval 0", "at least 1"),
        ({"training": {"eval_iters": 5}}, "--eval-iters", "--eval-interval"),
        ({"checkpoint": {"save_interval": 5}}, "--save-interval", "--save"),
        ({"training": {"exit_interval": 5}}, "--exit-interval", "--save"),
    ],
)
def test_refusals(sections: dict[str, dict[str, object]], flag: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(**sections), 1)
    assert any(line.startswith(flag) and remedy in line for line in str(caught.value).split("\n"))


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path: Path) -> None:
    save = str(tmp_path)
    validate(config(checkpoint={"save": save}), 1)
    (tmp_path / TRACKER).write_text("5")
    with pytest.raises(ConfigError, match="holds the checkpoints of a run"):
        validate(config(checkpoint={"save": save}), 1)
    validate(config(checkpoint={"save": save, "load": save}), 1)


def test_all_errors_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(training={"train_iters": None}, optimizer={"clip_grad": -1.0}), 1)
    assert len(str(caught.value).split("\n")) == 2


def tower(folder: Path, **fields: object) -> str:
    """A folder with the configuration of a teacher and a weight file by name."""
    folder.mkdir()
    common = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "patch_size": 14,
        "num_attention_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps({**common, **fields}))
    (folder / "model.safetensors").touch()
    return str(folder)


def test_a_good_teacher(tmp_path: Path) -> None:
    validate(config(vision={"patch_aligning": True, "teacher_model": tower(tmp_path / "clip")}), 1)
    vision = {"hidden_size": 64, "patch_size": 16, "num_attention_heads": 4}
    both = tower(tmp_path / "both", model_type="clip", hidden_size=512, vision_config=vision)
    validate(config(vision={"patch_aligning": True, "teacher_model": both}), 1)


def test_sizes_that_a_teacher_leaves_to_its_model_type(tmp_path: Path) -> None:
    """As published SigLIP folders do: 768 wide in patches of 16."""
    siglip = tower(
        tmp_path / "siglip", model_type="siglip", vision_config={"model_type": "siglip_vision_model"}
    )
    settings = {"patch_aligning": True, "teacher_model": siglip}
    validate(config(vision={**settings, "teacher_hidden_size": 768}), 1)
    assert tower_sizes(siglip, False, TEACHER_FLAGS) == TowerSizes(768, 16, 12, 3072, 224)


@pytest.mark.parametrize(
    ("vision", "flag", "remedy"),
    [
        ({"patch_aligning": True}, "--patch-aligning", "--no-patch-aligning"),
        ({"teacher_model": "x"}, "--teacher-model", "add that"),
        (
            {"patch_aligning": True, "align_loss_weight": 0.0},
            "--align-loss-weight 0.0",
            "--no-patch-aligning",
        ),
        (
            {"patch_aligning": True, "align_loss_weight": float("nan")},
            "--align-loss-weight nan",
            "positive",
        ),
        ({"patch_aligning": True, "aligning_heads": 5}, "--teacher-hidden-size 64", "--aligning-heads 5"),
        ({"patch_aligning": True, "tap_interval": 5}, "--tap-interval 5", "smaller interval"),
        (
            {"patch_aligning": True, "teacher_model": "/nowhere"},
            "--teacher-model /nowhere",
            "no config.json",
        ),
    ],
)
def test_teacher_refusals(vision: dict[str, object], flag: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(config(vision=vision), 1)
    assert any(line.startswith(flag) and remedy in line for line in str(caught.value).split("\n")), (
        caught.value
    )


def test_wrong_teacher_folders(tmp_path: Path) -> None:
    def error_of(folder: str) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(config(vision={"patch_aligning": True, "teacher_model": folder}), 1)
        return str(caught.value)

    wide = tower(tmp_path / "wide", hidden_size=1024)
    assert error_of(wide) == f"--teacher-hidden-size 64: the tower in {wide} is 1024 wide; set it to 1024"
    assert "does not describe a vision tower" in error_of(
        tower(tmp_path / "text", model_type="gpt2", patch_size=None)
    )
    assert "does not describe a vision tower" in error_of(tower(tmp_path / "new", model_type="unheard_of"))
    deep = {"patch_aligning": True, "teacher_model": tower(tmp_path / "deep"), "teacher_hidden_state": 14}
    with pytest.raises(ConfigError, match=r"--teacher-hidden-state 14: .* has 13 of them"):
        validate(config(vision=deep), 1)
    bare = Path(tower(tmp_path / "bare"))
    (bare / "model.safetensors").unlink()
    assert "no weights there" in error_of(str(bare))
    broken = Path(tower(tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    assert "does not describe a vision tower" in error_of(str(broken))
