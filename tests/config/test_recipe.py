"""Recipes and flags: one tree, flags over recipe over preset, and mistakes that name themselves."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from megatron_eve.config import (
    PRESETS,
    Blend,
    ConfigError,
    ModelConfig,
    RunConfig,
    from_dict,
    from_saved,
    load_recipe,
    parse,
    parse_blend,
    parse_split,
)
from megatron_eve.config.flag_suggestions import OTHER_NAMES
from megatron_eve.config.recipe import known_flags, other_names, sections_of
from megatron_eve.config.upgrade import upgrade_saved

PREVIOUS = Path(__file__).parents[1] / "golden" / "previous" / "checkpoint" / "iter_0000003"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "preset: eve_7b\n"
        "parallel: {tensor_model_parallel_size: 4, sequence_parallel: true}\n"
        "optimizer:\n  lr: 4e-5\n"  # a string in YAML 1.1
        "training: {global_batch_size: 512, train_samples: 33_000_000}\n"
    )
    return path


def sizes_of(config: RunConfig) -> tuple[object, object]:
    """As a preset has them."""
    return config.model, config.vision


def test_published_sizes() -> None:
    eve, vision = PRESETS["eve_7b"]
    sizes = (eve.num_layers, eve.hidden_size, eve.ffn_hidden_size, eve.num_attention_heads, eve.vocab_size)
    assert sizes == (32, 4096, 11008, 32, 32000)
    assert (
        vision.patch_embedding_size,
        vision.image_size,
        vision.teacher_size,
        eve.max_position_embeddings,
    ) == (
        1024,
        672,
        336,
        4096,
    )
    assert PRESETS["eve_7b_hd"].vision.image_size == 1344


@pytest.mark.parametrize(
    ("flags", "value"),
    [([], None), (["--variable-seq-lengths"], True), (["--variable-seq-lengths", "false"], False)],
)
def test_a_flag_that_may_be_left_to_the_machine(flags: list[str], value: bool | None) -> None:
    assert parse([*flags, "--seed", "7"]).parallel.variable_seq_lengths is value


def test_flags_over_recipe_over_preset(recipe: Path) -> None:
    config = parse(
        ["--config", str(recipe), "--tensor-model-parallel-size", "2", "--num-layers=16", "--bf16"]
    )
    assert config.parallel.tensor_model_parallel_size == 2  # flag over recipe
    assert config.parallel.sequence_parallel is True  # recipe
    assert config.optimizer.lr == 4e-5
    assert config.model.num_layers == 16  # flag over preset
    assert config.model.hidden_size == 4096  # preset
    assert config.training.bf16 is True
    assert config.optimizer.clip_grad == 0.0  # default: the published runs do not clip
    assert config.total_iterations == -(-33_000_000 // 512)


def test_preset_flag_over_recipe(recipe: Path) -> None:
    assert sizes_of(parse(["--config", str(recipe), "--preset", "eve_tiny"])) == PRESETS["eve_tiny"]


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    path = tmp_path / "layout.yaml"
    path.write_text(
        "parallel: {tensor_model_parallel_size: 2, pipeline_model_parallel_size: 2}\n"
        "training: {global_batch_size: null, recompute_granularity: null}\n"
    )
    return path


def test_a_later_recipe_over_an_earlier_one(recipe: Path, layout: Path) -> None:
    layout.write_text(layout.read_text().replace("global_batch_size: null, ", ""))
    config = parse(["--config", str(recipe), str(layout), "--pipeline-model-parallel-size", "4"])
    assert config.parallel.tensor_model_parallel_size == 2  # the later one
    assert config.parallel.sequence_parallel is True  # only in the earlier one
    assert config.parallel.pipeline_model_parallel_size == 4  # flag over both
    assert config.training.global_batch_size == 512
    assert sizes_of(config) == PRESETS["eve_7b"]
    turned = parse(["--preset=eve_7b", "--config", str(layout), str(recipe)])
    assert turned.parallel.tensor_model_parallel_size == 4
    assert turned.parallel.pipeline_model_parallel_size == 2
    assert turned == load_recipe(layout, recipe, preset="eve_7b")


def test_nothing_in_a_later_recipe_takes_a_setting_back(recipe: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training: {recompute_granularity: full}\n")
    second.write_text("preset: eve_tiny\ntraining: {recompute_granularity: null}\n")
    config = load_recipe(recipe, first, second)
    assert config.training.recompute_granularity is None
    assert sizes_of(config) == PRESETS["eve_tiny"]  # the last preset that is named
    assert sizes_of(load_recipe(recipe, first, second, preset="eve_mini")) == PRESETS["eve_mini"]


def test_a_mistake_is_laid_to_its_file(recipe: Path, layout: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, layout)
    assert str(caught.value).startswith(f"{layout}, line 2: training.global_batch_size: ")
    with pytest.raises(ConfigError) as caught:
        load_recipe(layout, recipe)  # though the second would set it right
    assert str(caught.value).startswith(f"{layout}, line 2: training.global_batch_size: ")
    layout.write_text("paralel: {}\n")
    with pytest.raises(
        ConfigError, match=r"layout\.yaml, line 1: paralel: no such setting; did you mean parallel\?"
    ):
        load_recipe(recipe, layout)
    layout.write_text("preset: eve_70b\n")
    with pytest.raises(ConfigError, match=r"layout\.yaml, line 1: preset: eve_70b: no such preset"):
        load_recipe(layout, recipe)
    with pytest.raises(ConfigError, match="--preset eve_70b: no such preset"):
        load_recipe(recipe, preset="eve_70b")
    layout.unlink()
    with pytest.raises(ConfigError, match=r"--config .*layout\.yaml: No such file"):
        parse(["--config", str(recipe), str(layout)])
    with pytest.raises(ConfigError, match="--config: a value is missing behind it"):
        parse(["--config", "--bf16"])


@pytest.mark.parametrize(
    ("written", "words"),
    [("one", ("one",)), ("[one, two]", ("one", "two")), ("[0.25, one, 3, two]", ("0.25", "one", "3", "two"))],
)
def test_datasets_in_a_recipe(tmp_path: Path, written: str, words: tuple[str, ...]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data:\n  data_path: {written}\n")
    assert parse(["--config", str(path)]).data.data_path == words
    flags = ["--data-path", "0.5", "a", "0.5", "b"]
    assert parse(["--config", str(path), *flags]).data.data_path == ("0.5", "a", "0.5", "b")


def test_blends() -> None:
    assert parse_blend(["a"]) == Blend(("a",))
    assert parse_blend(["a", "b"]) == Blend(("a", "b"))
    assert parse_blend(["3", "a", "1e-2", "b"]) == Blend(("a", "b"), (3.0, 0.01))
    assert parse_blend(["0.3", "a"]) == Blend(("a",), (0.3,))
    assert [parse_split(text) for text in ("100,0", "99,1", "1,1")] == [0.0, 0.01, 0.5]


def test_round_trip() -> None:
    config = RunConfig(**PRESETS["eve_7b_hd"]._asdict())
    assert from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())), "test") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paralel: {tensor_model_parallel_size: 2}", "paralel: "),
        ("parallel: {tensor_parallel_size: 2}", "parallel.tensor_parallel_size: "),
        ("optimizer: {lr: fast}", "optimizer.lr: Input should be a valid number"),
        ("training: {stage: 4}", "training.stage: Input should be 1, 2 or 3"),
        ("training: 5", "training: must be a section"),
        ("- a\n- b", "a recipe is a mapping"),
        ("a: [", "not a YAML recipe"),
        ("preset: eve_70b", "no such preset; choose one of eve_7b"),
        ("data: {data_path: !!python/object/apply:os.system ['true']}", "not a YAML recipe"),
    ],
)
def test_wrong_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert message in str(caught.value)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tiny_recipes_load(stage: int) -> None:
    path = Path(__file__).parents[2] / "examples" / "eve_tiny" / f"stage{stage}.yaml"
    config = load_recipe(path)
    assert config.training.stage == stage
    assert config.optimizer.min_lr == 0.0 and config.vision.patch_aligning
    sizes = config.model, replace(config.vision, patch_aligning=False)
    assert sizes == PRESETS["eve_tiny"]


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section in sections_of(RunConfig().to_dict()).values():
        for name in section:
            assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tensor-parallel", "2"],
            "--tensor-parallel: no such flag; did you mean --tensor-model-parallel-size?",
        ),
        (["--sede=3"], "--sede: no such flag; did you mean --seed?"),
        (
            ["--micro-batch-size", "4"],
            "--micro-batch-size: no such flag; samples are packed into microbatches",
        ),
        (["--lr_warmup_iters", "4"], "--lr_warmup_iters: no such flag; the warm-up is a share of the run"),
        (
            ["--finetune"],
            "--finetune: no such flag; --pretrained-checkpoint FOLDER starts from the weights alone",
        ),
        (["--no-stage"], "--no-stage: no such flag; did you mean --stage?"),
        (["--zzz"], "--zzz: no such flag; --help lists them all"),
        (["--lr", "abc"], "--lr abc: must be a number"),
        (["--num-layers", "1.5"], "--num-layers 1.5: must be a whole number"),
        (["--stage", "7"], "--stage 7: must be one of 1, 2, 3"),
        (["--lr"], "--lr: a value is missing behind it"),
        (["--bf16", "maybe"], "maybe: no flag, nor a value of the flag before it"),
        (["--lr-overrides", "a"], "--lr-overrides: takes globs and rates in turns"),
    ],
)
def test_wrong_flag(flags: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One sentence, nothing printed beside it."""
    with pytest.raises(ConfigError) as caught:
        parse(flags)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_other_names_name_what_is_there() -> None:
    """No flag that exists is listed as one of another trainer's, and the remedies name flags that exist."""
    known, others = known_flags(), other_names("eve")
    tools = {"--template", "--image-root", "--time", "--signal"}  # of preprocess_data.py, and of sbatch
    assert not known & set(others)
    for flag, remedy in others.items():
        named = set(re.findall(r"--[a-z0-9][a-z0-9-]*", remedy))
        assert named <= known | tools, (flag, named - known)


def test_wrong_keys_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "preset: eve_tiny\ntraining:\n  globl_batch_size: 4\n  micro_batch_size: 2\n"
        "optimizer: {lr: 1e-4,\n  hidden_size: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert sorted(str(caught.value).splitlines()) == [
        f"{path}, line 3: training.globl_batch_size: no such setting; did you mean global_batch_size?",
        f"{path}, line 4: training.micro_batch_size: no such setting; {OTHER_NAMES['--micro-batch-size']}",
        f"{path}, line 6: optimizer.hidden_size: no such setting; hidden_size belongs into the section model",
    ]
    path.write_text("training: {stage: 2}\n\nlr: 1e-4\n")
    with pytest.raises(
        ConfigError, match="line 3: lr: no such section; lr belongs into the section optimizer"
    ):
        load_recipe(path)
    path.write_text("training:\n  stage: 2\n bf16: [\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 3: not a YAML recipe"):
        load_recipe(path)


OLD = (
    "preset: eve_7b\n"
    "model: {num_layers: 16,\n  image_size: 1344}\n"
    "alignment:\n  patch_aligning: true\n  align_loss_weight: 0.5\n"
)


def test_a_recipe_of_an_older_version(tmp_path: Path) -> None:
    """EVE's settings stood in the sections `model` and `alignment`; both forms may stand in one recipe."""
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    found, sizes = load_recipe(path), PRESETS["eve_7b"]
    assert found.model == replace(sizes.model, num_layers=16)
    wanted = replace(sizes.vision, image_size=1344, patch_aligning=True, align_loss_weight=0.5)
    assert found.vision == wanted
    path.write_text(OLD + "vision: {teacher_model: clip}\n")
    assert load_recipe(path).vision == replace(wanted, teacher_model="clip")
    new = tmp_path / "new.yaml"
    new.write_text("vision: {image_size: 672}\nalignment:\n")
    assert load_recipe(path, new).vision.image_size == 672
    assert load_recipe(new, path).vision.image_size == 1344


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("vision: {image_size: 672}\n", "3: model.image_size: no such setting; image_size belongs into"),
        (
            "vision: {align_loss_weight: 1}\n",
            "6: alignment.align_loss_weight: no such setting; align_loss_weight be",
        ),
        ("vision: {image_sise: 672}\n", "7: vision.image_sise: no such setting; did you mean image_size?"),
        ("vision: 3\n", "7: vision: must be a section with settings"),
        (
            "data: {teacher_model: 3}\n",
            "7: data.teacher_model: no such setting; teacher_model belongs into",
        ),
    ],
)
def test_mistakes_in_a_recipe_of_an_older_version(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD + text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}, line {line}")
    path.write_text(OLD.replace("0.5", "much").replace("true", "perhaps"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}, line 5: vision.patch_aligning: Input should be a valid boolean")
    assert second.startswith(f"{path}, line 6: vision.align_loss_weight: Input should be a valid number")


def test_a_configuration_of_an_older_checkpoint() -> None:
    old = yaml.safe_load((PREVIOUS / "config.yaml").read_text(encoding="utf-8"))
    assert "family" not in old and "alignment" in old and "vision" not in old
    config, note = from_saved(old, "run")
    assert note is None and config.family == "eve" and "alignment" in old
    moved = {
        **old["alignment"],
        **{name: old["model"][name] for name in asdict(config.vision) if name in old["model"]},
    }
    assert asdict(config.vision) == moved
    # What that version did not write has its default.
    assert {**asdict(config.model), **moved} == {**asdict(ModelConfig()), **old["model"], **moved}
    assert upgrade_saved(config.to_dict()) == config.to_dict()
    assert upgrade_saved(old)["vision"] == asdict(config.vision)
    both = {**old, "vision": {"image_size": 448}}
    config, note = from_saved(both, "run")
    assert config.vision.image_size == 448
    assert note == "run: settings of another version are left out: model.image_size"
    assert config.vision.teacher_hidden_size == old["model"]["teacher_hidden_size"]


def test_a_checkpoint_of_another_version_may_have_settings_that_are_unknown_here() -> None:
    values = RunConfig().to_dict()
    values["training"]["gone_since"] = 3
    values["whole_section"] = {"one": 1}
    config, note = from_saved(values, "run/iter_0000002")
    assert config == RunConfig()
    assert note is not None and note.startswith(
        "run/iter_0000002: settings of another version are left out: "
    )
    assert "training.gone_since" in note and "whole_section" in note and "\n" not in note
    assert values["training"]["gone_since"] == 3  # what was given stays as it is
    assert from_saved(RunConfig().to_dict(), "run") == (RunConfig(), None)
    with pytest.raises(ConfigError, match="gone_since: no such setting"):  # a recipe is held to what it says
        from_dict(values, "recipe.yaml")
    values["training"]["stage"] = "seven"
    with pytest.raises(ConfigError, match=r"training\.stage"):
        from_saved(values, "run")
