"""Scaled rotary embeddings in config.json: as transformers 4 and 5 write them, in a run, and in exports of a family."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_eve.checkpoint.compatibility import CheckpointError, check_model, check_start, start_note
from megatron_eve.checkpoint.hf.config import HFConfig, check_config, settings_of
from megatron_eve.config import ConfigError, ModelConfig, RunConfig
from megatron_eve.models.rope_scaling import position_note, read_scaling, scaling_field, scaling_words
from tests.convert.test_conversion import convert
from tests.convert.test_language_models import LINEAR, LLAMA3, folder_of
from tests.convert.vila_folders import LANGUAGE, edit_config, llava
from tests.golden_dir import find_golden

# Settings that scale nothing, that divide positions by 2 and by 4, and that are Llama 3.2's.
PLAIN: dict[str, Any] = {}
BY_2: dict[str, Any] = {"rotary_seq_len_interpolation_factor": 2.0}
BY_4: dict[str, Any] = {"rotary_seq_len_interpolation_factor": 4.0}
BY_32: dict[str, Any] = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}
FILE = Path("config.json")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that is not scaled."""
    return folder_of(tmp_path_factory.mktemp("rope"), "qwen2")


def config_with(folder: Path, source: Path, **fields: Any) -> Path:
    """A folder with the source's config.json, but for some fields."""
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    edit_config(folder, **fields)
    return folder


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": None, "rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1}},
        {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e6}},
        {"rope_parameters": {"rope_theta": 1e6}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope_parameters": None, "rope_scaling": {}, "rope_theta": 1e6},
    ],
)
def test_a_rope_that_scales_nothing_is_none(source: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    model = HFConfig.read(config_with(tmp_path, source, **rope)).model_config()
    assert model.rotary_base == 1_000_000 and scaling_field(model) is None


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, BY_4),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}}, BY_4),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}}, BY_4),
        ({"rope_scaling": {**LLAMA3, "factor": 32.0}}, BY_32),
        ({"rope_parameters": {**LLAMA3, "factor": 32, "rope_theta": 5e5}, "rope_scaling": None}, BY_32),
        # Of two, transformers takes `rope_scaling`.
        ({"rope_parameters": LINEAR, "rope_scaling": {"type": "linear", "factor": 4}}, BY_4),
        ({"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "default"}}, PLAIN),
    ],
)
def test_spellings_of_scaling(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    """As transformers 4 and 5 write it; what is written here is read as the same."""
    assert read_scaling(fields, FILE) == settings
    assert read_scaling({"rope_scaling": scaling_field(ModelConfig(**settings))}, FILE) == settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type is 'yarn', and rotary"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "are not scaled here but by linear and llama3"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', and rotary"),
        ({"rope_scaling": {"type": "longrope", "factor": 1}}, "rope_type is 'longrope', and rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_type is 'yarn', and rotary"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None, and a number from 1 on is needed (rope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5, and a number from 1 on"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor is '8', and a number from 1 on is needed"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}},
            "low_freq_factor is 2.0, and 1 is what llama3 is computed with here (rope_scaling: {",
        ),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8}}, "high_freq_factor is 8, and 4 is what"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                }
            },
            "original_max_position_embeddings is None, and 8192 is what llama3",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "0.5, and rotary embeddings are of the whole head",
        ),
        ({"partial_rotary_factor": 0.5}, "0.5, and rotary embeddings are of the whole head"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not settings by name"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta is 'much', and a whole number"),
        ({"rope_parameters": None, "rope_theta": 10000.5}, "rope_theta is 10000.5, and a whole number"),
    ],
)
def test_what_is_not_computed_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    folder = config_with(tmp_path, source, **fields)
    assert convert("import", "--source", folder, "--target", tmp_path / "start") == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert told.startswith(f"error: {folder}/config.json: ") and message in told


@pytest.mark.parametrize(
    ("rope", "taken"),
    [
        (None, (PLAIN, BY_2, BY_4)),
        ({"type": "linear", "factor": 4}, (BY_4,)),
        ({**LLAMA3, "factor": 32}, (BY_32,)),
    ],
    ids=["not scaled", "linear", "llama3"],
)
def test_a_run_that_is_scaled_otherwise_is_told(
    source: Path, tmp_path: Path, rope: dict[str, Any] | None, taken: tuple[dict[str, Any], ...]
) -> None:
    """But for positions that a run divides to take longer samples than an unscaled model's."""
    found = settings_of(config_with(tmp_path, source, rope_scaling=rope), image_size=224, teacher_size=112)
    plain = replace(found.model, **{name: getattr(ModelConfig, name) for name in (*BY_4, *BY_32)})
    for settings in (PLAIN, BY_2, BY_4, BY_32):
        model = replace(plain, **settings)
        config = RunConfig(model=model, vision=found.vision)
        if settings in taken:
            check_config(tmp_path, config)
            check_start(tmp_path, found.model.__dict__, model)
            continue
        words = f"rotary embeddings are {scaling_words(found.model)}, and {scaling_words(model)} in this run; use "
        with pytest.raises(ConfigError) as refused:
            check_config(tmp_path, config)
        assert f"{tmp_path}/config.json: {words}" in str(refused.value)
        with pytest.raises(CheckpointError) as unlike:
            check_start(tmp_path, found.model.__dict__, model)
        assert str(unlike.value).startswith(f"{tmp_path}: its {words}")


def test_a_run_with_longer_samples_says_so() -> None:
    short, long = ModelConfig(max_position_embeddings=4096), ModelConfig(max_position_embeddings=8200)
    assert position_note(long, short) is None and position_note(short, short) is None
    told = position_note(short, long)
    assert told is not None and told.endswith(
        "8200; --rotary-seq-len-interpolation-factor 3 would divide theirs"
    )
    told = position_note(short, replace(long, rotary_seq_len_interpolation_factor=3.0))
    assert told is not None and told.startswith(
        "rotary embeddings are not scaled, and scaled linearly (--rotary"
    )
    assert position_note(replace(short, **BY_32), replace(long, **BY_32)) is None


def test_a_checkpoint_of_an_older_version_is_not_scaled(tmp_path: Path) -> None:
    """It resumes as it was, and as nothing else."""
    saved = {name: value for name, value in ModelConfig().__dict__.items() if name not in {**BY_4, **BY_32}}
    check_model(tmp_path, saved, ModelConfig())
    with pytest.raises(
        CheckpointError, match=r"8\) in this run; resume with the same flags$|32\) in this run"
    ):
        check_model(tmp_path, saved, ModelConfig(**BY_32))
    with pytest.raises(
        CheckpointError, match="with the same flags, or start anew from its weights with --pre"
    ):
        check_model(tmp_path, saved, ModelConfig(**BY_4))
    check_start(tmp_path, saved, ModelConfig(**BY_4))


def test_a_resumed_run_is_scaled_as_it_was(tmp_path: Path) -> None:
    for before in (PLAIN, BY_2, BY_4, BY_32):
        saved = ModelConfig(**before)
        for now in (PLAIN, BY_2, BY_4, BY_32):
            model = ModelConfig(**now)
            if before == now:
                check_model(tmp_path, saved.__dict__, model)
                continue
            with pytest.raises(CheckpointError) as refused:
                check_model(tmp_path, saved.__dict__, model)
            words = (
                f"{scaling_words(saved)}, and {scaling_words(model)} in this run; resume with the same flags"
            )
            assert str(refused.value).startswith(f"{tmp_path}: its rotary embeddings are {words}")


def test_a_start_from_a_checkpoint_says_so_too(tmp_path: Path) -> None:
    """An import has the positions of its folder."""
    saved = ModelConfig(max_position_embeddings=4096).__dict__
    assert start_note(tmp_path, saved, ModelConfig(max_position_embeddings=4096)) is None
    told = start_note(tmp_path, saved, ModelConfig(max_position_embeddings=8192))
    assert told is not None and told.startswith(
        f"{tmp_path}: holds a model of 4096 positions, and samples of this"
    )


@pytest.mark.parametrize(
    "rope", [pytest.param(LINEAR, marks=pytest.mark.slow), LLAMA3], ids=["linear", "llama3"]
)
def test_every_layout_of_a_family_holds_it(tmp_path: Path, rope: dict[str, Any]) -> None:
    """A LLaVA of transformers' own making: through VILA 1.0's and VILA-1.5's folders, and back to transformers'."""
    from transformers import AutoConfig

    source = llava(tmp_path / "llava", sizes={**LANGUAGE, "vocab_size": 384, "rope_scaling": dict(rope)})
    settings = settings_of(source).model
    assert scaling_field(settings) is not None
    for layout, file in (("vila1.0", "config.json"), ("vila1.5", "llm/config.json")):
        run, target = tmp_path / f"run for {layout}", tmp_path / layout
        assert convert("import", "--source", source, "--target", run) == 0
        assert convert("export", "--source", run, "--target", target, "--published-layout", layout) == 0
        assert json.loads((target / file).read_text())["rope_scaling"] == scaling_field(settings)
        source = target
        assert settings_of(source).model == settings
    words = ("--format", "transformers", "--tokenizer", find_golden("tokenize") / "tokenizer.model")
    assert convert("export", "--source", run, "--target", tmp_path / "back", *words) == 0
    text = AutoConfig.from_pretrained(tmp_path / "back").text_config
    found = {name: text.rope_parameters[name] for name in rope}
    assert found == rope and text.rope_parameters["rope_theta"] == 10000.0
