"""From YAML recipes and flags to one `RunConfig`.

pydantic checks the recipe (types, unknown keys; `4e-5`, a string in YAML 1.1, becomes a number) and tyro turns
the same dataclasses into flags, so there is one place where a setting is named. YAML goes through the safe
loader: no value can name a Python object.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.presets import PRESETS
from megatron_eve.config.schema import RunConfig

_ADAPTER = TypeAdapter(RunConfig)


@dataclass(frozen=True)
class CommandLine:
    """Pretrain a vision-language model. Every setting has a default, a place in the recipe, and a flag.

    Order of precedence: flags, then the recipes of --config, the last one first, then the sizes of --preset, then the
    defaults shown.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    config: tuple[str, ...] = ()
    """YAML recipes; their sections are the groups below, and a later one overrides the earlier ones key by key."""
    preset: str | None = None
    """Model sizes by name: eve_7b, eve_7b_hd, eve_tiny, eve_mini. A recipe may name one too (`preset: eve_7b`)."""


def parse(argv: list[str] | None = None, prog: str | None = None) -> RunConfig:
    """Read the command line (and the recipes it names) into a `RunConfig`; prints help and exits on --help.

    Raises:
        ConfigError: unknown preset, unreadable recipe, unknown key or wrong type in it. A wrong flag exits with
            status 2 and a message, as is usual for a command.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipes, presets = _values_of(argv, "--config"), _values_of(argv, "--preset")
    preset = presets[0] if presets else None
    base = load_recipe(*map(Path, recipes), preset=preset)
    command_line = tyro.cli(
        tyro.conf.OmitArgPrefixes[CommandLine],
        prog=prog,
        args=argv,
        default=CommandLine(run=base, config=recipes, preset=preset),
    )
    return command_line.run


def load_recipe(*paths: Path, preset: str | None = None) -> RunConfig:
    """A `RunConfig` from recipes, a later one over the earlier ones key by key, and a preset; there may be none.

    Args:
        paths: YAML recipes.
        preset: model sizes by name, over those that a recipe names.

    Raises:
        ConfigError: naming the file and the key.
    """
    recipes = [(path, _read_yaml(path)) for path in paths]
    for path, recipe in recipes:
        _known_preset(recipe.get("preset"), f"{path}: preset:")
    named = [recipe.pop("preset") for _, recipe in recipes if recipe.get("preset") is not None]
    preset = preset or (named[-1] if named else None)
    _known_preset(preset, "--preset")
    config = RunConfig(model=PRESETS[preset]) if preset else RunConfig()
    for path, recipe in recipes:  # one by one, so that a mistake is laid to the file that makes it
        config = from_dict(_merge(config.to_dict(), recipe, path), source=str(path))
    return config


def _known_preset(preset: object, source: str) -> None:
    if preset is not None and preset not in list(PRESETS):
        raise ConfigError(f"{source} {preset}: no such preset; choose one of {', '.join(PRESETS)}")


def from_dict(values: dict[str, Any], source: str) -> RunConfig:
    """Check nested dictionaries (a recipe, or the configuration kept in a checkpoint) and build the tree.

    Raises:
        ConfigError: one line for each wrong key, with `source` in front.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        lines = [f"{source}: {'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not a YAML recipe: {error}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(
            f"--config {path}: a recipe is a mapping of sections, not a {type(recipe).__name__}"
        )
    return recipe


def _merge(tree: dict[str, Any], recipe: dict[str, Any], path: Path) -> dict[str, Any]:
    """The recipe's sections over the tree's; keys that do not exist are kept for pydantic to refuse."""
    for section, values in recipe.items():
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ConfigError(
                f"--config {path}: {section}: must be a section with settings; known: {', '.join(tree)}"
            )
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def _values_of(argv: list[str], flag: str) -> tuple[str, ...]:
    """The values of a flag that decides the defaults of all others, so it is read before the parser runs."""
    values: tuple[str, ...] = ()
    for i, word in enumerate(argv):
        if word == flag:
            values = tuple(itertools.takewhile(lambda value: not value.startswith("-"), argv[i + 1 :]))
        elif word.startswith(flag + "="):
            values = (word[len(flag) + 1 :],)
        else:
            continue
        if not values:
            raise ConfigError(f"{flag}: names nothing; give it a value or leave it out")
    return values
