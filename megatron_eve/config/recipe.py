"""Builds the `RunConfig` from YAML recipes and flags.

pydantic checks the recipe (types, unknown keys; `4e-5`, a string in YAML 1.1, becomes a number) and `flags.py` makes
flags of the same dataclasses, so there is one place where a setting is named. YAML goes through the safe
loader: no value can name a Python object.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_eve.config.early_flags import flag_value, flag_values
from megatron_eve.config.errors import ConfigError
from megatron_eve.config.family_types import adapter, plain, typed
from megatron_eve.config.flag_suggestions import OTHER_NAMES
from megatron_eve.config.flags import PRETRAIN, TRAIN_TOWER, Command, FlagParser, flag_parser
from megatron_eve.config.pipeline import expand_layout
from megatron_eve.config.presets import PRESETS, family_of_preset
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.upgrade import LineOf, upgrade_recipe, upgrade_saved
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family, tower_family
from megatron_eve.runtime.command_line import nearest


def parse(argv: list[str] | None = None, command: Command | None = None) -> RunConfig:
    """Read the command line (and the recipes it names) into a `RunConfig`; prints help and exits on --help.

    Args:
        argv: words of the command line; None: of this process.
        command: that it is of. A family whose runs another command makes is refused then. None: any.

    Raises:
        ConfigError: unknown flag or preset, unreadable recipe, unknown key or wrong type in it; one line for each.
        FamilyError: an unknown family.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipes, preset = flag_values(argv, "--config"), flag_value(argv, "--preset")
    family = flag_value(argv, "--family")
    usual = (command or PRETRAIN).family
    base = load_recipe(*map(Path, recipes), preset=preset, family=family, usual=usual)
    theirs = TRAIN_TOWER if tower_family(base.family) else PRETRAIN
    if command is not None and command != theirs:
        named = f"--preset {preset}" if preset else f"--family {base.family}"
        raise ConfigError(f"{named}: trains a {theirs.trains}; use {theirs.prog}")
    parser = _parser(base, theirs)
    tree = base.to_dict()
    for name, value in vars(parser.parse_args(argv)).items():
        section, dot, setting = name.partition(".")
        if dot:  # the others were read above
            tree[section][setting] = value
    return expand_layout(from_dict(tree, source="flags"))


def _parser(base: RunConfig, command: Command) -> FlagParser:
    return flag_parser(typed(find_family(base.family), base), command, other_names(base.family))


def named_sources(argv: list[str] | None = None) -> tuple[str | None, tuple[str, ...]]:
    """The preset and the recipes that a command line names, which `parse` has read; a preset may stand in a recipe."""
    argv = sys.argv[1:] if argv is None else argv
    recipes, presets = flag_values(argv, "--config"), flag_values(argv, "--preset")
    inside = [_read_yaml(Path(recipe))[0].get("preset") for recipe in recipes]
    named = [*presets[:1], *(preset for preset in reversed(inside) if preset)]
    return (named[0] if named else None), recipes


def sections_of(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a configuration as dictionaries, without `family`."""
    return {name: part for name, part in tree.items() if isinstance(part, dict)}


def known_flags(family: str = DEFAULT_FAMILY) -> set[str]:
    """Every flag that `parse` takes for a model of this family, written with dashes."""
    return _parser(RunConfig(family=family), PRETRAIN).known_flags()


def other_names(family: str) -> dict[str, str]:
    """Flags of other programs with their names here, for a model of this family."""
    return {**OTHER_NAMES, **find_family(family).other_names}


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def load_recipe(
    *paths: Path, preset: str | None = None, family: str | None = None, usual: str = DEFAULT_FAMILY
) -> RunConfig:
    """A `RunConfig` from recipes, a later one over the earlier ones key by key, and a preset; there may be none.

    Args:
        paths: YAML recipes.
        preset: model sizes by name, over those that a recipe names.
        family: by name, over that which a recipe names; where none does it is that of the preset.
        usual: the family where there is no preset either.

    Raises:
        ConfigError: naming the file and the key.
        FamilyError: an unknown family.
    """
    recipes = [(path, *_read_yaml(path)) for path in paths]
    if family:
        find_family(family)
    for path, recipe, line_of in reversed(recipes):  # the last one that names a family
        named = recipe.pop("family", None)
        if named is not None and family is None:
            family = str(named)
            find_family(family, f"{path}, line {line_of(('family',))}: family:")
    for path, recipe, line_of in recipes:
        _known_preset(recipe.get("preset"), f"{path}, line {line_of(('preset',))}: preset:", family)
    chosen = [recipe.pop("preset") for _, recipe, _ in recipes if recipe.get("preset") is not None]
    preset = preset or (chosen[-1] if chosen else None)
    _known_preset(preset, "--preset", family)
    family = family or (family_of_preset(preset) if preset else usual)
    config = from_dict({"family": family}, source="--family")
    if tower := tower_family(family):
        config = replace(config, optimizer=replace(config.optimizer, **tower.optimizer_defaults))
    if preset:
        sizes = find_family(family).presets[preset]
        config = replace(config, model=sizes.model, vision=sizes.vision)
    for path, read, lines in recipes:  # one by one, so that an error names the file that causes it
        recipe, line_of = upgrade_recipe(read, family, lines)
        config = from_dict(_merge(config.to_dict(), recipe, path, line_of), source=str(path), line_of=line_of)
    return config


def _known_preset(preset: object, source: str, family: str | None) -> None:
    """Raise ConfigError for a preset that the family (or, if none is named, any family) does not have."""
    known = PRESETS if family is None else find_family(family).presets
    if preset is None or (isinstance(preset, str) and preset in known):
        return
    of = f" of the family {family}" if family else ""
    raise ConfigError(
        f"{source} {preset}: no such preset{of}; "
        + (f"choose one of {', '.join(known)}" if known else "it has none, so give the sizes themselves")
    )


def from_saved(values: dict[str, Any], source: str) -> tuple[RunConfig, str | None]:
    """The configuration kept in a checkpoint, which another version of this program may have written.

    Args:
        values: of the sections; not changed.
        source: what messages call the checkpoint.

    Returns:
        The configuration, and a message that names settings unknown to this version, which are left out; None if all
        are known.

    Raises:
        ConfigError: a value that this version cannot take.
    """
    sections = upgrade_saved(values)
    unknown = []
    try:
        adapter(find_family(sections["family"])).validate_python(sections)
    except ValidationError as error:
        for one in error.errors():
            if one["type"] != "unexpected_keyword_argument":
                continue
            *outer, key = one["loc"]
            (sections[str(outer[0])] if outer else sections).pop(str(key))
            unknown.append(".".join(str(part) for part in one["loc"]))
    note = f"{source}: settings of another version are left out: {', '.join(unknown)}" if unknown else None
    return expand_layout(from_dict(sections, source)), note


def from_dict(values: dict[str, Any], source: str, line_of: LineOf | None = None) -> RunConfig:
    """Check nested dictionaries (a recipe's; see `from_saved` for a checkpoint's) and build the tree.

    Args:
        values: of the sections.
        source: what an error message calls the file.
        line_of: the lines of its keys, where they are known.

    Raises:
        ConfigError: one line for each wrong key, with `source` in front.
    """
    family = str(values.get("family", DEFAULT_FAMILY))
    try:
        return plain(adapter(find_family(family, f"{source}: family:")).validate_python(values))
    except ValidationError as error:
        lines, settings = [], asdict(find_family(family).Config())
        for one in error.errors():
            known, section = one["type"] != "unexpected_keyword_argument", values.get(str(one["loc"][0]))
            # Settings of the family may be in a section of older versions, or in the current one.
            inside = section if not known and len(one["loc"]) == 1 and isinstance(section, dict) else {}
            moved = [(*one["loc"], key) for key in inside if key in settings]
            for place in moved or [one["loc"]]:
                where = f"{source}, line {line_of(place)}" if line_of else source
                message = one["msg"] if known else f"no such setting; {_key_hint(place, family)}"
                lines.append(f"{where}: {'.'.join(str(part) for part in place)}: {message}")
        raise ConfigError("\n".join(lines)) from None


def _key_hint(keys: tuple[Any, ...], family: str) -> str:
    """Suggestion for a recipe key that does not exist."""
    tree = RunConfig(family=family).to_dict()
    key = str(keys[-1])
    sections = [name for name, section in sections_of(tree).items() if key in section]
    if sections:
        return f"{key} belongs into the section {sections[0]}"
    inside = tree.get(str(keys[0]), {}) if len(keys) > 1 else tree
    settings = [name for section in sections_of(tree).values() for name in section]
    return (
        other_names(family).get(f"--{_dashed(key)}")
        or nearest(key, inside)
        or nearest(key, settings)
        or f"known here: {', '.join(inside)}"
    )


def _read_yaml(path: Path) -> tuple[dict[str, Any], LineOf]:
    """A recipe, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"--config {path}{line}: not a YAML recipe: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not a YAML recipe: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(
            f"--config {path}: a recipe is a mapping of sections, not a {type(recipe).__name__}"
        )
    root = yaml.compose(text, Loader=yaml.SafeLoader)

    def line_of(keys: tuple[Any, ...]) -> int:
        node, line = root, 1
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            found = [pair for pair in pairs if getattr(pair[0], "value", None) == str(key)]
            if not found:
                break
            line, node = found[-1][0].start_mark.line + 1, found[-1][1]
        return line

    return recipe, line_of


def _merge(tree: dict[str, Any], recipe: dict[str, Any], path: Path, line_of: LineOf) -> dict[str, Any]:
    """The recipe's sections over the tree's; keys that do not exist are kept for pydantic to refuse."""
    for section, values in recipe.items():
        if values is None:
            continue
        if not isinstance(values, dict):
            where = f"{path}, line {line_of((section,))}: {section}:"
            if section not in tree:
                hint = _key_hint((section,), tree["family"])
                raise ConfigError(f"{where} no such section; {hint}")
            raise ConfigError(
                f"{where} must be a section with settings; known: {', '.join(sections_of(tree))}"
            )
        tree[section] = {**tree.get(section, {}), **values}
    return tree
