"""Families by name: where they are found, what is said when they are not, and that none of it loads torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import get_protocol_members

from megatron_eve.checkpoint.compatibility import CheckpointError, check_family, check_resume
from megatron_eve.config import PRESETS, ConfigError, RunConfig, from_dict, load_recipe, parse, validate
from megatron_eve.models.eve.family import FAMILY
from megatron_eve.models.family import ModelFamily, begins_at_random
from megatron_eve.models.registry import FamilyError, families, family_names, find_family

# Of a family that has a name, presets and stages alone.
LACKING = sorted(get_protocol_members(ModelFamily) - {"name", "presets", "stages"})
# A family of no sizes of its own, as a package elsewhere would write it.
MODULE = """
from dataclasses import dataclass

from megatron_eve.config.schema import ModelConfig
from megatron_eve.models.family import PartCounts, Preset, Stage
from megatron_eve.models.hf_format import HFFormat
from megatron_eve.models.model_parts import FamilyFlops
from megatron_eve.models.text_format import TextRules


@dataclass(frozen=True)
class Config:
    __pydantic_config__ = {{"extra": "forbid"}}

    colours: int = 3  # numbers of a pixel


class Family:
    name = "{name}"
    Config = Config
    presets = {{"{name}_tiny": Preset(ModelConfig(num_layers=2), Config(colours=1))}}
    other_names = {{}}
    stages = {{2: Stage("all of it", ("*",))}}
    parts = {{}}
    image_flags = {{}}
    text_rules = TextRules()
    reads_codes = False

    def visual_label_work(self, config):
        return 0.0

    def draws_random_numbers(self, config):
        return False

    def code_tower(self, config):
        return None

    def code_sizes(self, config):
        return None

    def check_sizes(self, config):
        yield from ()

    def check(self, config):
        if config.data.seq_length == 7:
            yield "--seq-length 7: not for {name}"

    def stage(self, config):
        return self.stages[config.training.stage]

    def image_work(self, config):
        return 0.0

    def chat_template(self):
        return "plain"

    def upgrade(self, tree):
        return tree

    def inference_settings(self, vision):
        return vision

    def parameter_counts(self, config):
        return PartCounts(config.vision.colours, 0)

    def fingerprint(self, config):
        return None

    def check_resume(self, saved, config, frozen):
        yield from ()

    def check_weights(self, saved, config):
        yield from ()

    def missing_parts(self, saved, config):
        return {{}}

    def front_end(self, config, transformer):
        return None

    def hugging_face(self):
        class Format(HFFormat):
            title = "{name}"
            model_types = ("{name}",)

        return Format()

    def golden(self):
        return None

    def objectives(self, config):
        return ()

    def flops(self, config, work):
        return FamilyFlops({{}}, {{}})

    def image_settings(self, config):
        return {{}}

    def check_image_settings(self, settings):
        yield from ()

    def image_planner(self, settings):
        return None

    def views(self, config):
        return {{}}


FAMILY = Family()
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write_family(folder: Path, package: str) -> str:
    """A package with a family in it; returns the name of its module."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / "family.py").write_text(MODULE.format(name=package))
    return f"{package}.family"


def test_the_family_of_the_package() -> None:
    assert family_names()[0] == "eve" and find_family("eve") is FAMILY
    assert [family.name for family in families()] == list(family_names())
    assert {"eve_7b", "eve_7b_hd", "eve_mini", "eve_tiny"} <= set(PRESETS)
    assert len(PRESETS) == len(list(PRESETS)) and PRESETS["eve_mini"].model == RunConfig().model
    assert "eve_70b" not in PRESETS


def test_no_family_loads_torch() -> None:
    """Sizes, checks and stages are asked for before torch is loaded; so is what `config` brings."""
    program = (
        "import sys\n"
        "from megatron_eve.models.registry import find_family\n"
        "from megatron_eve.config import parse, validate\n"
        "from megatron_eve.models.eve.family import FAMILY\n"
        "assert find_family('eve') is FAMILY and not list(FAMILY.check(parse(['--mock-data'])))\n"
        "assert FAMILY.image_planner(FAMILY.image_settings(parse([])))(640, 480).rows == 55\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & {name.split('.')[0] for name in sys.modules}))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_a_preprocessing_worker_loads_no_parsers() -> None:
    """Each of its processes imports its encoder and the family: the parsers of recipes and flags take as long again."""
    program = (
        "import sys\n"
        "import megatron_eve.data.preprocessing.encoders\n"
        "from megatron_eve.models.registry import find_family\n"
        "assert find_family('eve').image_planner({})(640, 480).rows > 1\n"
        "print(sorted({'torch', 'tyro', 'pydantic', 'yaml'} & {name.split('.')[0] for name in sys.modules}))\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (found.stdout, found.stderr) == ("[]\n", "")


def test_each_may_be_imported_first() -> None:
    """The families import the configuration, which asks the registry: none may have to come before another."""
    for module in ("config", "models.registry", "models.family", "models.eve.family", "models.eve.checks"):
        program = f"import megatron_eve.{module}; from megatron_eve.config import PRESETS; PRESETS['eve_7b']"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr


def test_a_module_named_directly(elsewhere: Path) -> None:
    name = write_family(elsewhere, "toy_direct")
    assert find_family(name).stages[2].name == "all of it"
    assert name not in family_names()


def test_an_installed_package_brings_one(elsewhere: Path) -> None:
    module = write_family(elsewhere, "toy_installed")
    info = elsewhere / "toy_installed-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy_installed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[megatron_eve.families]\ntoy_installed = {module}:FAMILY\n")
    assert "toy_installed" in family_names()
    assert find_family("toy_installed").name == "toy_installed"
    assert PRESETS["toy_installed_tiny"].model.num_layers == 2


@pytest.mark.parametrize(
    "name", ["no_such", "no_such.family", "megatron_eve.models.eve.none", ".x", "a..b", ""]
)
def test_unknown_families_are_answered_with_those_there_are(name: str) -> None:
    with pytest.raises(FamilyError) as caught:
        find_family(name)
    assert str(caught.value) == (
        f"--family {name}: no such family; choose one of {', '.join(family_names())}, or name a module that has one "
        "(package.module)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "its module has no FAMILY; see megatron_eve/models/family.py"),
        (
            "class F:\n    name = 'f'\n    presets = stages = {}\nFAMILY = F()\n",
            f"its FAMILY lacks {', '.join(LACKING)}; see megatron_eve/models/family.py",
        ),
        ("import no_such_module_here\n", "it needs the module no_such_module_here, which is not here"),
        ("raise OSError('no\\ndisk')\n", "its module cannot be imported (OSError: no disk)"),
        ("x = (\n", "its module cannot be imported (SyntaxError: '(' was never closed"),
    ],
)
def test_modules_that_hold_no_family(elsewhere: Path, text: str, message: str) -> None:
    package = f"toy_{abs(hash(text))}"
    write_family(elsewhere, package)
    (elsewhere / package / "family.py").write_text(text)
    with pytest.raises(FamilyError) as caught:
        find_family(f"{package}.family")
    assert str(caught.value).startswith(f"--family {package}.family: {message}")
    assert "\n" not in str(caught.value)


def test_a_preset_implies_its_family(elsewhere: Path) -> None:
    assert parse([]).family == "eve" and parse(["--preset", "eve_tiny"]).family == "eve"
    module = write_family(elsewhere, "toy_preset")
    config = parse(["--family", module, "--preset", "toy_preset_tiny", "--mock-data", "--train-iters=1"])
    assert (config.family, config.model.num_layers, config.vision.colours) == (module, 2, 1)
    validate(config, 1)
    assert from_dict(config.to_dict(), "saved") == config
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(f"family: {module}\npreset: toy_preset_tiny\n")
    assert load_recipe(recipe) == RunConfig(family=module, model=config.model, vision=config.vision)
    assert parse(["--config", str(recipe), "--num-layers", "4"]).family == module
    with pytest.raises(ConfigError) as caught:  # the flag goes before the recipe
        parse(["--config", str(recipe), "--family", "eve"])
    assert str(caught.value).startswith(
        f"{recipe}, line 2: preset: toy_preset_tiny: no such preset of the family eve; choose one of eve_7b, "
    )
    with pytest.raises(
        ConfigError, match=r"--preset eve_7b: no such preset of the family toy_preset\.family; cho"
    ):
        parse(["--family", module, "--preset", "eve_7b"])
    with pytest.raises(FamilyError, match="--family no_such: no such family; choose one of eve"):
        parse(["--family", "no_such"])
    later = elsewhere / "later.yaml"
    later.write_text("model: {num_layers: 2}\nfamily: no_such\n")
    with pytest.raises(FamilyError) as unknown:
        load_recipe(recipe, later)
    assert str(unknown.value).startswith(
        f"{later}, line 2: family: no_such: no such family; choose one of eve"
    )


def test_a_family_checks_its_own_settings(elsewhere: Path) -> None:
    module = write_family(elsewhere, "toy_checks")
    words = ["--family", module, "--mock-data", "--train-iters=1", "--colours=2"]
    validate(parse(words), 1)
    with pytest.raises(ConfigError, match=r"^--image-size: no such flag"):  # that is EVE's
        parse([*words, "--image-size", "700"])
    with pytest.raises(ConfigError, match=r"^--stage 1: must be one of 2$"):
        parse([*words, "--stage", "1"])
    with pytest.raises(ConfigError) as caught:
        config = parse([*words, "--seq-length", "7"])
        validate(replace(config, training=replace(config.training, stage=1)), 1)
    assert str(caught.value).splitlines() == [
        "--stage 1: the family toy_checks has no such stage; choose from 2",
        "--seq-length 7: not for toy_checks",
    ]


def test_help_and_settings_are_those_of_the_family(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = write_family(elsewhere, "toy_help")
    with pytest.raises(SystemExit):
        parse(["--family", module, "--help"])
    told = capsys.readouterr().out
    assert "--colours" in told and "--stage {2}" in told and "--image-size" not in told
    assert "what trains: 2 all of it" in told and "--seq-length" in told
    assert RunConfig(family=module).vision == find_family(module).Config()
    recipe = elsewhere / "recipe.yaml"
    recipe.write_text(f"family: {module}\nvision:\n  colours: 2\n  image_size: 224\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(f"{recipe}, line 4: vision.image_size: no such setting; ")
    recipe.write_text(f"family: {module}\nalignment: {{patch_aligning: true}}\n")
    with pytest.raises(ConfigError, match="line 2: alignment: no such setting"):
        load_recipe(recipe)


def test_a_run_of_another_family_is_not_resumed(elsewhere: Path) -> None:
    module = write_family(elsewhere, "toy_resumed")
    config = RunConfig()
    saved = {"config": config.to_dict(), "dataset": {}}
    check_family(Path("run"), saved, config)
    with pytest.raises(CheckpointError) as caught:
        check_resume(Path("run"), saved, replace(config, family=module), None, None)
    assert str(caught.value) == (
        f"run: was made with --family eve, this run has {module}; use the same --family or --preset, or "
        "another checkpoint"
    )
    del saved["config"]["family"]  # of a version that had one family
    check_family(Path("run"), saved, config)
    with pytest.raises(CheckpointError, match="was made with --family eve"):
        check_family(Path("run"), saved, replace(config, family=module))


def test_what_trains_and_what_begins_at_random() -> None:
    decoder, front, tap = (
        "decoder.layers.3.mlp.linear_fc1.weight", "vision_model.projector.0.weight", "decoder.layers.3.tap.weight",
    )  # fmt: skip
    first, second = FAMILY.stages[1], FAMILY.stages[2]
    assert [first.trains(name) for name in (decoder, front, tap)] == [False, True, True]
    assert all(second.trains(name) for name in (decoder, front, tap))
    assert (first.decoder_trains, second.decoder_trains) == (False, True)
    assert begins_at_random(FAMILY, front, ["front end"]) and not begins_at_random(FAMILY, tap, ["front end"])
    assert begins_at_random(FAMILY, tap, ["aligning layer"]) and not begins_at_random(
        FAMILY, decoder, FAMILY.parts
    )
