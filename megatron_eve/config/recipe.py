"""From YAML recipes and flags to one `RunConfig`.

pydantic checks the recipe (types, unknown keys; `4e-5`, a string in YAML 1.1, becomes a number) and tyro turns
the same dataclasses into flags, so there is one place where a setting is named. YAML goes through the safe
loader: no value can name a Python object.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro
import yaml
from pydantic import ValidationError

from megatron_eve.config.errors import ConfigError
from megatron_eve.config.family_types import adapter, command_line_of, plain
from megatron_eve.config.flag_suggestions import OTHER_NAMES, flag_hint, nearest
from megatron_eve.config.presets import PRESETS, family_of_preset
from megatron_eve.config.schema import RunConfig
from megatron_eve.config.upgrade import LineOf, upgrade_recipe, upgrade_saved
from megatron_eve.models.registry import DEFAULT_FAMILY, find_family


def parse(argv: list[str] | None = None, prog: str | None = None) -> RunConfig:
    """Read the command line (and the recipes it names) into a `RunConfig`; prints help and exits on --help.

    Raises:
        ConfigError: unknown flag or preset, unreadable recipe, unknown key or wrong type in it; one line for each.
        FamilyError: an unknown family.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipes, presets, named = (_values_of(argv, flag) for flag in ("--config", "--preset", "--family"))
    preset = presets[0] if presets else None
    base = load_recipe(*map(Path, recipes), preset=preset, family=named[0] if named else None)
    _check_flags(argv, base.family)
    defaults = command_line_of(find_family(base.family), base, recipes, preset)
    said = io.StringIO()
    try:
        # tyro draws a box around what is wrong, over the width of the terminal.
        with contextlib.redirect_stderr(said):
            command_line = tyro.cli(
                tyro.conf.OmitArgPrefixes[type(defaults)],  # type: ignore[misc]
                prog=prog,
                args=argv,
                default=defaults,
            )
    except SystemExit as ended:
        if ended.code in (0, None):  # --help
            raise
        raise ConfigError(_without_box(said.getvalue())) from None
    return plain(command_line.run)


def named_sources(argv: list[str] | None = None) -> tuple[str | None, tuple[str, ...]]:
    """The preset and the recipes that a command line names, which `parse` has read; a preset may stand in a recipe."""
    argv = sys.argv[1:] if argv is None else argv
    recipes, presets = _values_of(argv, "--config"), _values_of(argv, "--preset")
    inside = [_read_yaml(Path(recipe))[0].get("preset") for recipe in recipes]
    named = [*presets[:1], *(preset for preset in reversed(inside) if preset)]
    return (named[0] if named else None), recipes


def sections_of(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a tree of settings, without what stands beside them (`family`)."""
    return {name: part for name, part in tree.items() if isinstance(part, dict)}


def known_flags(family: str = DEFAULT_FAMILY) -> set[str]:
    """Every flag that `parse` takes for a model of this family, written with dashes."""
    flags = {"--config", "--preset", "--family", "--help"}
    for section in sections_of(RunConfig(family=family).to_dict()).values():
        for name, value in section.items():
            dashed = name.replace("_", "-")
            flags.add(f"--{dashed}")
            if isinstance(value, bool):
                flags.add(f"--no-{dashed}")
    return flags


def other_names(family: str) -> dict[str, str]:
    """What flags of other programs are called here, for a model of this family."""
    return {**OTHER_NAMES, **find_family(family).other_names}


def _check_flags(argv: Sequence[str], family: str) -> None:
    """Refuse words that look like flags and are none, each with what it may have meant.

    Raises:
        ConfigError: a line for each.
    """
    known, others = known_flags(family), other_names(family)
    unknown = [word.split("=", 1)[0] for word in argv if word.startswith("--") and len(word) > 2]
    errors = [
        f"{flag}: no such flag; {flag_hint(flag, known, others)}"
        for flag in unknown
        if _dashed(flag) not in known
    ]
    if errors:
        raise ConfigError("\n".join(errors))


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


# What tyro passes on from Python and argparse, in words that need no Python.
_REWORDED = (
    (r"Error parsing (\S+): could not convert string to float: '(.*)'", r"\1 \2: must be a number"),
    (r"Error parsing (\S+): invalid literal for int\(\) with base 10: '(.*)'", r"\1 \2: must be a whole number"),
    (r"Error parsing (--lr-overrides): .*", r"\1: takes globs and rates in turns, as in 'vision_model.*' 4e-4"),
    (r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.", r"\2 \1: must be one of \3"),
    (r"Missing value for argument '(.*)'\..*", r"\1: a value is missing behind it"),
    (r"Unrecognized options: (.*)", r"\1: no flag, nor a value of the flag before it; --help lists the flags"),
)  # fmt: skip


def _without_box(text: str) -> str:
    """An error message of tyro as one sentence."""
    lines = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    sentence = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
    for pattern, words in _REWORDED:
        if re.fullmatch(pattern, sentence):
            said = re.sub(pattern, words, sentence)
            return said.replace("'", "").rstrip(",") if "must be one of" in words else said
    return sentence or " ".join(text.split())


def load_recipe(*paths: Path, preset: str | None = None, family: str | None = None) -> RunConfig:
    """A `RunConfig` from recipes, a later one over the earlier ones key by key, and a preset; there may be none.

    Args:
        paths: YAML recipes.
        preset: model sizes by name, over those that a recipe names.
        family: by name, over that which a recipe names; where none does it is that of the preset.

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
    family = family or (family_of_preset(preset) if preset else DEFAULT_FAMILY)
    config = from_dict({"family": family}, source="--family")
    if preset:
        sizes = find_family(family).presets[preset]
        config = replace(config, model=sizes.model, vision=sizes.vision)
    for path, read, lines in recipes:  # one by one, so that a mistake is laid to the file that makes it
        recipe, line_of = upgrade_recipe(read, family, lines)
        config = from_dict(_merge(config.to_dict(), recipe, path, line_of), source=str(path), line_of=line_of)
    return config


def _known_preset(preset: object, source: str, family: str | None) -> None:
    """Refuse a preset that the family does not have, or none has where no family is named."""
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
        The configuration, and a sentence that names the settings of it that are not known here, which are left out;
        None where all are known.

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
    return from_dict(sections, source), note


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
            # Settings of the family may stand in a section that older versions had, and in today's too.
            inside = section if not known and len(one["loc"]) == 1 and isinstance(section, dict) else {}
            moved = [(*one["loc"], key) for key in inside if key in settings]
            for place in moved or [one["loc"]]:
                where = f"{source}, line {line_of(place)}" if line_of else source
                said = one["msg"] if known else f"no such setting; {_key_hint(place, family)}"
                lines.append(f"{where}: {'.'.join(str(part) for part in place)}: {said}")
        raise ConfigError("\n".join(lines)) from None


def _key_hint(keys: tuple[Any, ...], family: str) -> str:
    """What to do about a key of a recipe that does not exist."""
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
